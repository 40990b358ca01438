/* The gradient of a linear layer's weight from the codes of its input: a product of 8-bit integers, which the library
 * that torch uses computes, and what stands before and after it. */
#include "fields.h"
#include "index.h"
#include "native.h"

#define TILE_COLUMNS 256
#define TILE_ELEMENTS (1 << 17) /* 512 KiB of floats: half of a second-level cache */

/* ---- coded rows to integers ---- */

INLINED void look_up_integers(const uint8_t *restrict codes, int64_t bits, const int8_t *restrict table,
                              int8_t *restrict to) {
    int8_t v[16] = {0};
    memcpy(v, table, (size_t)1 << bits);
    const int8_t v0 = v[0], v1 = v[1], v2 = v[2], v3 = v[3], v4 = v[4], v5 = v[5], v6 = v[6], v7 = v[7];
    const int8_t v8 = v[8], v9 = v[9], v10 = v[10], v11 = v[11], v12 = v[12], v13 = v[13], v14 = v[14], v15 = v[15];
    if (bits <= 2) {
        for (int i = 0; i < PORTION; i++) {
            const uint8_t c = codes[i];
            const int8_t a = c & 1 ? v1 : v0, b = c & 1 ? v3 : v2;
            to[i] = c & 2 ? b : a;
        }
    } else if (bits == 3) {
        for (int i = 0; i < PORTION; i++) {
            const uint8_t c = codes[i];
            const int8_t a = c & 1 ? v1 : v0, b = c & 1 ? v3 : v2, d = c & 1 ? v5 : v4, e = c & 1 ? v7 : v6;
            const int8_t f = c & 2 ? b : a, g = c & 2 ? e : d;
            to[i] = c & 4 ? g : f;
        }
    } else {
        for (int i = 0; i < PORTION; i++) {
            const uint8_t c = codes[i];
            const int8_t a = c & 1 ? v1 : v0, b = c & 1 ? v3 : v2, d = c & 1 ? v5 : v4, e = c & 1 ? v7 : v6;
            const int8_t f = c & 1 ? v9 : v8, g = c & 1 ? v11 : v10, h = c & 1 ? v13 : v12, k = c & 1 ? v15 : v14;
            const int8_t l = c & 2 ? b : a, m = c & 2 ? e : d, o = c & 2 ? g : f, p = c & 2 ? k : h;
            const int8_t q = c & 4 ? m : l, r = c & 4 ? p : o;
            to[i] = c & 8 ? r : q;
        }
    }
}

CLONED static void integers_of_rows(const integers_args *a, int64_t first, int64_t last) {
    for (int64_t row = first; row < last; row++) {
        const int8_t *table = a->table + (a->member ? (int64_t)a->member[row] << a->bits : 0);
        int8_t *out = a->out + row * a->n;
        for (int64_t start = 0; start < a->n; start += PORTION) {
            uint8_t codes[PORTION];
            int8_t rest[PORTION];
            const int full = a->n - start >= PORTION;
            read_codes(a->fields + row * a->fields_stride, start, a->n, a->bits, codes);
            look_up_integers(codes, a->bits, table, full ? out + start : rest);
            if (!full) memcpy(out + start, rest, (size_t)(a->n - start));
        }
        if (a->k) FOR_EACH_KEPT(a->index + row * a->index_stride, a->n, a->k, a->coding, i, j, out[i] = 0);
    }
}

EXPORTED int64_t hf_backrazor_integers(const integers_args *a) {
    int64_t rows = a->rows, threads = smaller(a->threads, rows);
#if defined(_OPENMP)
#pragma omp parallel for num_threads((int)(threads > 0 ? threads : 1)) schedule(static)
#endif
    for (int64_t t = 0; t < threads; t++) integers_of_rows(a, rows * t / threads, rows * (t + 1) / threads);
    return DONE;
}

/* ---- the output's gradient, rounded at random ---- */

/* C. Wellons, "Prospecting for Hash Functions", 2018: the function he calls lowbias32. */
INLINED uint32_t scramble(uint32_t x) {
    x ^= x >> 16;
    x *= 0x7feb352du;
    x ^= x >> 15;
    x *= 0x846ca68bu;
    return x ^ x >> 16;
}

CLONED static void round_columns(const round_args *a, int64_t first, int64_t last) {
    uint32_t seed = (uint32_t)a->seed;
    for (int64_t start = first; start < last; start += TILE_COLUMNS) {
        int64_t width = smaller(TILE_COLUMNS, last - start);
        int32_t greatest[TILE_COLUMNS] = {0};
        float factor[TILE_COLUMNS], sum[TILE_COLUMNS] = {0};
        for (int64_t row = 0; row < a->rows; row++) {
            const float *grad = a->grad + row * a->columns + start;
            const float s = a->row_scale ? from_bfloat16(a->row_scale[row]) : 1.0f;
            for (int64_t i = 0; i < width; i++) {
                int32_t m = (int32_t)(bits_of(grad[i] * s) & 0x7fffffffu);
                greatest[i] = m > greatest[i] ? m : greatest[i];
                sum[i] += grad[i];
            }
        }
        for (int64_t i = 0; i < width; i++) {
            float top = float_of((uint32_t)greatest[i]);
            factor[i] = top != 0.0f ? 127.0f / top : 0.0f;
            a->scale[start + i] = top / 127.0f;
            a->sum[start + i] = sum[i];
        }
        for (int64_t row = 0; row < a->rows; row++) {
            const float *grad = a->grad + row * a->columns + start;
            int8_t *out = a->out + row * a->columns + start;
            const float s = a->row_scale ? from_bfloat16(a->row_scale[row]) : 1.0f;
            const uint32_t place = (uint32_t)(row * a->columns + start);
            for (int64_t i = 0; i < width; i++) {
                float u = (float)(int32_t)(scramble((place + (uint32_t)i) ^ seed) >> 8) * 0x1p-24f;
                /* Truncation rounds down what is positive. Not a number becomes 1. */
                float up = grad[i] * s * factor[i] + u + 128.0f;
                up = up > 1.0f ? up : 1.0f;
                up = up < 255.0f ? up : 255.0f;
                out[i] = (int8_t)((int32_t)up - 128);
            }
        }
    }
}

EXPORTED int64_t hf_backrazor_round(const round_args *a) {
    int64_t tiles = (a->columns + 63) / 64, threads = smaller(a->threads, tiles);
#if defined(_OPENMP)
#pragma omp parallel for num_threads((int)(threads > 0 ? threads : 1)) schedule(static)
#endif
    for (int64_t t = 0; t < threads; t++) {
        round_columns(a, smaller(64 * (tiles * t / threads), a->columns),
                      smaller(64 * (tiles * (t + 1) / threads), a->columns));
    }
    return DONE;
}

/* ---- the weight's gradient ---- */

typedef struct {
    int32_t *place; /* of every kept element */
    float *value;
} kept_elements;

INLINED void read_kept(const gradient_args *a, const kept_elements *kept) {
    for (int64_t row = 0; row < a->rows; row++) {
        int32_t *place = kept->place + row * a->k;
        for (int64_t j = 0; j < a->k; j++) place[j] = 0, kept->value[row * a->k + j] = 0.0f;
        FOR_EACH_KEPT(a->index + row * a->index_stride, a->n, a->k, a->coding, i, j, place[j] = (int32_t)i;
                      kept->value[row * a->k + j] = read_value(a->values, a->value_dtype, row * a->k + j));
    }
}

INLINED float integer_at(const float *product, int64_t i) { return (float)(int32_t)bits_of(product[i]); }

/* The columns from `start` on, `width` of them. `sum`: (n, width) floats: x^T dY for the kept elements of x. */
CLONED static void finish_columns(const gradient_args *a, const kept_elements *kept, int64_t start, int64_t width,
                                  float *restrict sum) {
    int64_t n = a->n, k = a->k;
    memset(sum, 0, (size_t)(n * width) * 4);
    for (int64_t row = 0; k && row < a->rows; row++) {
        const float *restrict grad = a->grad + row * a->columns + start;
        for (int64_t j = 0; j < k; j++) {
            float value = kept->value[row * k + j];
            float *restrict to = sum + kept->place[row * k + j] * width;
            for (int64_t i = 0; i < width; i++) to[i] += value * grad[i];
        }
    }
    if (a->transposed) {
        for (int64_t i = 0; i < n; i++) {
            const float gamma = a->gamma ? a->gamma[i] : 1.0f, beta = a->beta ? a->beta[i] : 0.0f;
            const float *restrict scale = a->scale + start, *restrict from = sum + i * width;
            float *restrict out = a->product + i * a->columns + start;
            for (int64_t o = 0; o < width; o++) out[o] = (integer_at(out, o) * scale[o] + from[o]) * gamma;
            if (a->beta) {
                for (int64_t o = 0; o < width; o++) out[o] += a->grad_sum[start + o] * beta;
            }
        }
        return;
    }
    for (int64_t block = 0; block < n; block += 64) {
        int64_t end = smaller(block + 64, n);
        for (int64_t o = 0; o < width; o++) {
            const float scale = a->scale[start + o], grad_sum = a->beta ? a->grad_sum[start + o] : 0.0f;
            float *restrict out = a->product + (start + o) * n;
            for (int64_t i = block; i < end; i++) out[i] = integer_at(out, i) * scale + sum[i * width + o];
            if (a->gamma) {
                for (int64_t i = block; i < end; i++) out[i] *= a->gamma[i];
            }
            if (a->beta) {
                for (int64_t i = block; i < end; i++) out[i] += grad_sum * a->beta[i];
            }
        }
    }
}

EXPORTED int64_t hf_backrazor_gradient(const gradient_args *a) {
    int64_t failed = 0, width = TILE_ELEMENTS / (a->n ? a->n : 1) / 16 * 16;
    width = width < 64 ? 64 : smaller(width, TILE_COLUMNS);
    int64_t tiles = (a->columns + width - 1) / width;
    size_t count = (size_t)(a->rows * a->k);
    kept_elements kept = {malloc(count * 4 + 1), malloc(count * 4 + 1)};
    if (kept.place && kept.value) {
        if (count) read_kept(a, &kept);
        int64_t threads = smaller(a->threads, tiles);
#if defined(_OPENMP)
#pragma omp parallel for num_threads((int)(threads > 0 ? threads : 1)) schedule(static) reduction(+ : failed)
#endif
        for (int64_t t = 0; t < threads; t++) {
            float *sum = malloc((size_t)(a->n * width) * 4 + 1);
            if (!sum) {
                failed++;
                continue;
            }
            for (int64_t tile = tiles * t / threads; tile < tiles * (t + 1) / threads; tile++) {
                finish_columns(a, &kept, tile * width, smaller(width, a->columns - tile * width), sum);
            }
            free(sum);
        }
    } else {
        failed = 1;
    }
    free(kept.place);
    free(kept.value);
    return failed ? NO_MEMORY : DONE;
}
