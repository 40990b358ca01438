/* Packed rows to floats. */
#include "fields.h"
#include "index.h"
#include "native.h"

typedef struct {
    float *x; /* the row */
    uint8_t *codes;
    uint8_t *plane;
} scratch;

INLINED void unpack_row(const unpack_args *a, int64_t row, const scratch *s, float *restrict x) {
    int64_t n = a->n;
    if (a->bits) {
        unpack_codes(a->fields + row * a->fields_stride, n, a->bits, s->plane, s->codes);
        look_up(s->codes, n, a->bits, a->levels, a->scale ? from_bfloat16(a->scale[row]) : 1.0f, x);
    } else if (!a->keep_base) {
        memset(x, 0, (size_t)n * 4);
    }
    if (a->k) {
        const uint8_t *index = a->index + row * a->index_stride;
        FOR_EACH_KEPT(index, n, a->k, a->coding, i, j, x[i] = read_value(a->values, a->value_dtype, row * a->k + j));
    }
    if (a->centre) {
        const uint16_t *centre = a->centre + (a->first + row) / a->group * n;
        for (int64_t i = 0; i < n; i++) x[i] += from_bfloat16(centre[i]);
    }
}

CLONED static void unpack_rows(const unpack_args *a, int64_t first, int64_t last, const scratch *s) {
    int64_t n = a->n;
    for (int64_t row = first; row < last; row++) {
        if (a->out_dtype == FLOAT32) {
            unpack_row(a, row, s, (float *)a->out + row * n);
            continue;
        }
        uint16_t *out = (uint16_t *)a->out + row * n;
        if (a->keep_base) {
            for (int64_t i = 0; i < n; i++) s->x[i] = from_bfloat16(out[i]);
        }
        unpack_row(a, row, s, s->x);
        for (int64_t i = 0; i < n; i++) out[i] = to_bfloat16(s->x[i]);
    }
}

EXPORTED int64_t hf_backrazor_unpack(const unpack_args *a) {
    int64_t rows = a->rows, failed = 0, threads = smaller(a->threads, rows);
#if defined(_OPENMP)
#pragma omp parallel for num_threads((int)(threads > 0 ? threads : 1)) schedule(static) reduction(+ : failed)
#endif
    for (int64_t t = 0; t < threads; t++) {
        size_t bytes = (size_t)(a->n + SLACK);
        uint8_t *memory = malloc(bytes * (4 + 2));
        if (!memory) {
            failed++;
            continue;
        }
        scratch s = {(float *)(void *)memory, memory + 4 * bytes, memory + 5 * bytes};
        unpack_rows(a, rows * t / threads, rows * (t + 1) / threads, &s);
        free(memory);
    }
    return failed ? NO_MEMORY : DONE;
}
