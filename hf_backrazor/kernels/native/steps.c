/* One bit for each element between two bounds, and gradients that depend on nothing else: `packing/steps.py`. */
#include "fields.h"
#include "native.h"

/* `first` is a multiple of 8. */
CLONED static void pack_bits(const steps_args *a, int64_t first, int64_t last) {
    const float low = a->low, high = a->high;
    for (int64_t start = first; start < last; start += PORTION) {
        float x[PORTION];
        uint8_t inside[PORTION];
        const int64_t count = smaller(PORTION, last - start);
        load_portion(a->x, a->dtype, start, count, x);
        /* Negated, so that NaN lies inside. */
        for (int i = 0; i < PORTION; i++) inside[i] = !(x[i] <= low) & !(x[i] >= high);
        for (int64_t i = count; i < PORTION; i++) inside[i] = 0;
        write_codes(inside, 0, count, 1, a->bits + start / 8);
    }
}

CLONED static void multiply(const steps_args *a, int64_t first, int64_t last) {
    /* Zero times infinity would not be zero. */
    const float in = a->inside, out = a->outside;
    const int in_is_zero = in == 0.0f, out_is_zero = out == 0.0f;
    for (int64_t start = first; start < last; start += PORTION) {
        float x[PORTION];
        uint8_t inside[PORTION];
        const int64_t count = smaller(PORTION, last - start);
        load_portion(a->x, a->dtype, start, count, x);
        read_codes(a->bits + start / 8, 0, count, 1, inside);
        for (int i = 0; i < PORTION; i++) {
            const float high = in_is_zero ? 0.0f : x[i] * in, low = out_is_zero ? 0.0f : x[i] * out;
            x[i] = inside[i] ? high : low;
        }
        store_portion(x, count, a->dtype, start, a->out);
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
    for (int64_t t = 0; t < threads; t++) pack_bits(a, bound(a, t, threads), bound(a, t + 1, threads));
    return DONE;
}

EXPORTED int64_t hf_backrazor_times_steps(const steps_args *a) {
    int64_t threads = a->threads > 0 ? a->threads : 1;
#if defined(_OPENMP)
#pragma omp parallel for num_threads((int)threads) schedule(static)
#endif
    for (int64_t t = 0; t < threads; t++) multiply(a, bound(a, t, threads), bound(a, t + 1, threads));
    return DONE;
}
