/* One bit for each element between two bounds, and gradients that depend on nothing else: `packing/steps.py`. */
#include "fields.h"
#include "native.h"

enum { CHUNK = 512 };

/* `first` is a multiple of 8. */
CLONED static void pack_chunks(const steps_args *a, int64_t first, int64_t last) {
    uint8_t inside[CHUNK + SLACK];
    const float low = a->low, high = a->high;
    for (int64_t start = first; start < last; start += CHUNK) {
        const int64_t n = smaller(CHUNK, last - start);
        /* Negated, so that NaN lies inside. */
        if (a->dtype == FLOAT32) {
            const float *x = (const float *)a->x + start;
            for (int64_t i = 0; i < n; i++) inside[i] = !(x[i] <= low) & !(x[i] >= high);
        } else {
            const uint16_t *x = (const uint16_t *)a->x + start;
            for (int64_t i = 0; i < n; i++) inside[i] = !(from_bfloat16(x[i]) <= low) & !(from_bfloat16(x[i]) >= high);
        }
        memset(inside + n, 0, SLACK);
        pack_1(inside, n, a->bits + start / 8);
    }
}

CLONED static void multiply_chunks(const steps_args *a, int64_t first, int64_t last) {
    uint8_t inside[CHUNK + SLACK];
    /* Zero times infinity would not be zero. */
    const float in = a->inside, out = a->outside;
    const int in_is_zero = in == 0.0f, out_is_zero = out == 0.0f;
    for (int64_t start = first; start < last; start += CHUNK) {
        const int64_t n = smaller(CHUNK, last - start);
        unpack_1(a->bits + start / 8, n, inside);
        if (a->dtype == FLOAT32) {
            const float *restrict x = (const float *)a->x + start;
            float *restrict to = (float *)a->out + start;
            for (int64_t i = 0; i < n; i++) {
                const float high = in_is_zero ? 0.0f : x[i] * in, low = out_is_zero ? 0.0f : x[i] * out;
                to[i] = inside[i] ? high : low;
            }
        } else {
            const uint16_t *restrict x = (const uint16_t *)a->x + start;
            uint16_t *restrict to = (uint16_t *)a->out + start;
            for (int64_t i = 0; i < n; i++) {
                const float value = from_bfloat16(x[i]);
                const float high = in_is_zero ? 0.0f : value * in, low = out_is_zero ? 0.0f : value * out;
                to[i] = to_bfloat16(inside[i] ? high : low);
            }
        }
    }
}

/* Bounds of a thread's share, in whole bytes of bits. */
static int64_t bound(const steps_args *a, int64_t t, int64_t threads) {
    return smaller((a->numel + 7) / 8 * t / threads * 8, a->numel);
}

EXPORTED int64_t hf_backrazor_pack_steps(const steps_args *a) {
    int64_t threads = a->threads > 0 ? a->threads : 1;
#if defined(_OPENMP)
#pragma omp parallel for num_threads((int)threads) schedule(static)
#endif
    for (int64_t t = 0; t < threads; t++) pack_chunks(a, bound(a, t, threads), bound(a, t + 1, threads));
    return DONE;
}

EXPORTED int64_t hf_backrazor_times_steps(const steps_args *a) {
    int64_t threads = a->threads > 0 ? a->threads : 1;
#if defined(_OPENMP)
#pragma omp parallel for num_threads((int)threads) schedule(static)
#endif
    for (int64_t t = 0; t < threads; t++) multiply_chunks(a, bound(a, t, threads), bound(a, t + 1, threads));
    return DONE;
}
