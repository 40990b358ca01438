/* Gradients of batch norms. A channel's rows of x_hat are unpacked twice, for the sums and for what depends on these: a
 * row stays in the cache, where the whole x_hat would be written and read again. A channel is one thread's, so that the
 * order of summation does not depend on threads. */
#include "native.h"
#include "unpack_row.h"

CLONED static void channel_gradients(const batch_norm_args *a, int64_t first, int64_t last, const row_scratch *s) {
    const int64_t n = a->x_hat.n, whole = n / LANES * LANES;
    const float *restrict x_hat = s->x;
    for (int64_t channel = first; channel < last; channel++) {
        double sum = 0, product = 0;
        for (int64_t sample = 0; sample < a->batch; sample++) {
            const int64_t row = sample * a->channels + channel;
            const float *restrict grad = a->grad + row * n;
            float sums[LANES] = {0}, products[LANES] = {0};
            unpack_row(&a->x_hat, row, s, s->x);
            for (int64_t i = 0; i < whole; i += LANES) {
                for (int64_t j = 0; j < LANES; j++) sums[j] += grad[i + j];
                for (int64_t j = 0; j < LANES; j++) products[j] += grad[i + j] * x_hat[i + j];
            }
            for (int64_t i = whole; i < n; i++) {
                sums[i - whole] += grad[i];
                products[i - whole] += grad[i] * x_hat[i];
            }
            for (int64_t j = 0; j < LANES; j++) sum += (double)sums[j], product += (double)products[j];
        }
        a->grad_beta[channel] = (float)sum;
        a->grad_gamma[channel] = (float)product;
        if (!a->grad_input) continue;
        const double count = (double)(a->batch * n);
        const float scale = a->scale[channel];
        const float mean = a->by_batch ? (float)(sum / count) : 0.0f;
        const float projection = a->by_batch ? (float)(product / count) : 0.0f;
        for (int64_t sample = 0; sample < a->batch; sample++) {
            const int64_t row = sample * a->channels + channel;
            const float *restrict grad = a->grad + row * n;
            float *restrict out = a->grad_input + row * n;
            if (a->by_batch) {
                if (a->batch > 1) unpack_row(&a->x_hat, row, s, s->x);
                for (int64_t i = 0; i < n; i++) out[i] = (grad[i] - mean - x_hat[i] * projection) * scale;
            } else {
                for (int64_t i = 0; i < n; i++) out[i] = grad[i] * scale;
            }
        }
    }
}

EXPORTED int64_t hf_backrazor_batch_norm(const batch_norm_args *a) {
    int64_t failed = 0, threads = smaller(a->threads, a->channels);
#if defined(_OPENMP)
#pragma omp parallel for num_threads((int)(threads > 0 ? threads : 1)) schedule(static) reduction(+ : failed)
#endif
    for (int64_t t = 0; t < threads; t++) {
        size_t bytes = (size_t)(a->x_hat.n + SLACK);
        uint8_t *memory = malloc(bytes * (4 + 2));
        if (!memory) {
            failed++;
            continue;
        }
        row_scratch s = {(float *)(void *)memory, memory + 4 * bytes, memory + 5 * bytes};
        channel_gradients(a, a->channels * t / threads, a->channels * (t + 1) / threads, &s);
        free(memory);
    }
    return failed ? NO_MEMORY : DONE;
}
