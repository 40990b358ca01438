/* For each element, the number of the cell that it lies in, and what the cells stand for: `packing/cells.py`. */
#include "fields.h"
#include "native.h"

#define STEPS 256

/* Cells of a portion, which begin with the steps `s`. */
INLINED void count_starts(const float *restrict x, float density, int64_t bits, const uint8_t *s,
                          uint8_t *restrict codes) {
    for (int i = 0; i < PORTION; i++) {
        float step = x[i] * density + STEPS / 2;
        step = step > 0.0f ? step : 0.0f; /* so NaN is 0, too */
        step = step < STEPS - 1 ? step : STEPS - 1;
        codes[i] = (uint8_t)(int32_t)step;
    }
    const uint8_t s1 = s[1];
#define FROM(v, j) ((v) >= s##j ? 1 : 0)
    if (bits == 1) {
        for (int i = 0; i < PORTION; i++) codes[i] = (uint8_t)FROM(codes[i], 1);
        return;
    }
    const uint8_t s2 = s[2], s3 = s[3];
    if (bits == 2) {
        for (int i = 0; i < PORTION; i++) {
            const uint8_t v = codes[i];
            codes[i] = (uint8_t)(FROM(v, 1) + FROM(v, 2) + FROM(v, 3));
        }
        return;
    }
    const uint8_t s4 = s[4], s5 = s[5], s6 = s[6], s7 = s[7];
    if (bits == 3) {
        for (int i = 0; i < PORTION; i++) {
            const uint8_t v = codes[i];
            codes[i] = (uint8_t)(FROM(v, 1) + FROM(v, 2) + FROM(v, 3) + FROM(v, 4) + FROM(v, 5) + FROM(v, 6) +
                                 FROM(v, 7));
        }
        return;
    }
    const uint8_t s8 = s[8], s9 = s[9], s10 = s[10], s11 = s[11], s12 = s[12], s13 = s[13], s14 = s[14], s15 = s[15];
    for (int i = 0; i < PORTION; i++) {
        const uint8_t v = codes[i];
        codes[i] = (uint8_t)(FROM(v, 1) + FROM(v, 2) + FROM(v, 3) + FROM(v, 4) + FROM(v, 5) + FROM(v, 6) + FROM(v, 7) +
                             FROM(v, 8) + FROM(v, 9) + FROM(v, 10) + FROM(v, 11) + FROM(v, 12) + FROM(v, 13) +
                             FROM(v, 14) + FROM(v, 15));
    }
#undef FROM
}

/* In double precision, the order of summation does not show. */
INLINED float mean_square(const cells_args *a, int64_t row) {
    double lanes[LANES] = {0};
    for (int64_t start = 0; start < a->n; start += PORTION) {
        float x[PORTION];
        load_portion(a->x, a->x_dtype, row * a->stride + start, smaller(PORTION, a->n - start), x);
        for (int i = 0; i < LANES; i++) lanes[i] += SQUARES(double, x, i);
    }
    return (float)(sum_doubles(lanes) / (double)a->n);
}

/* Of a row that is not a number, the first. */
INLINED int64_t fitting_member(const cells_args *a, float square) {
    int32_t member = 0;
    for (int64_t j = 0; j < a->members - 1; j++) member += square >= a->bounds[j];
    return member;
}

CLONED static void encode_rows(const cells_args *a, int64_t first, int64_t last) {
    const int64_t n = a->n;
    for (int64_t row = first; row < last; row++) {
        const int64_t member = fitting_member(a, mean_square(a, row));
        const uint8_t *starts = a->starts + (member << a->bits);
        a->member[row] = (uint8_t)member;
        for (int64_t start = 0; start < n; start += PORTION) {
            float x[PORTION];
            uint8_t codes[PORTION];
            const int64_t count = smaller(PORTION, n - start), at = row * a->stride + start;
            load_portion(a->x, a->x_dtype, at, count, x);
            count_starts(x, a->density[member], a->bits, starts, codes);
            for (int64_t i = count; i < PORTION; i++) codes[i] = 0;
            write_codes(codes, start, n, a->bits, a->fields + row * a->fields_stride);
        }
    }
}

EXPORTED int64_t hf_backrazor_encode_cells(const cells_args *a) {
    int64_t rows = a->rows, threads = smaller(a->threads, rows);
#if defined(_OPENMP)
#pragma omp parallel for num_threads((int)(threads > 0 ? threads : 1)) schedule(static)
#endif
    for (int64_t t = 0; t < threads; t++) encode_rows(a, rows * t / threads, rows * (t + 1) / threads);
    return DONE;
}

CLONED static void decode_rows(const values_args *a, int64_t first, int64_t last) {
    const int64_t n = a->n;
    for (int64_t row = first; row < last; row++) {
        float values[16] = {0};
        memcpy(values, a->table + ((int64_t)a->member[row] << a->bits), sizeof(float) << a->bits);
        for (int64_t start = 0; start < n; start += PORTION) {
            uint8_t codes[PORTION];
            float x[PORTION];
            const int64_t at = row * n + start;
            const int direct = a->out_dtype == FLOAT32 && n - start >= PORTION;
            read_codes(a->fields + row * a->fields_stride, start, n, a->bits, codes);
            look_up(codes, a->bits, values, direct ? (float *)a->out + at : x);
            if (!direct) store_portion(x, smaller(PORTION, n - start), a->out_dtype, at, a->out);
        }
    }
}

EXPORTED int64_t hf_backrazor_decode_cells(const values_args *a) {
    int64_t rows = a->rows, threads = smaller(a->threads, rows);
#if defined(_OPENMP)
#pragma omp parallel for num_threads((int)(threads > 0 ? threads : 1)) schedule(static)
#endif
    for (int64_t t = 0; t < threads; t++) decode_rows(a, rows * t / threads, rows * (t + 1) / threads);
    return DONE;
}
