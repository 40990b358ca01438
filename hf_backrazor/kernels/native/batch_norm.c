/* Gradients of batch norms. Of x_hat a channel is unpacked at a time, and stays in the cache until its sums are there,
 * where all of it would be written to memory and read again; a channel that is too large is unpacked twice. A channel is
 * one thread's, so that the order of summation does not depend on threads. */
#include "native.h"
#include "unpack_row.h"

/* Elements of a channel that stay: 512 KiB. */
enum { KEPT_NUMEL = 1 << 17 };

static int keeps_channel(const batch_norm_args *a) { return a->batch * a->x_hat.n <= KEPT_NUMEL; }

/* The gradient's row that is read soon: channels are read one after the other, and of each a row for each sample. */
INLINED const float *coming_row(const batch_norm_args *a, int64_t channel, int64_t sample) {
    const int64_t ahead = 1 + FETCH_AHEAD / (4 * a->x_hat.n);
    const int64_t place = smaller(channel * a->batch + sample + ahead, a->batch * a->channels - 1);
    return a->grad + (place % a->batch * a->channels + place / a->batch) * a->x_hat.n;
}

/* `x` has room for a row, or for all rows of a channel if these stay. */
CLONED static void channel_gradients(const batch_norm_args *a, int64_t first, int64_t last, float *x) {
    const int64_t n = a->x_hat.n, whole = n / LANES * LANES, stride = keeps_channel(a) ? n : 0;
    for (int64_t channel = first; channel < last; channel++) {
        double sum = 0, product = 0;
        for (int64_t sample = 0; sample < a->batch; sample++) {
            const int64_t row = sample * a->channels + channel;
            const float *grad = a->grad + row * n;
            float *restrict x_hat = x + sample * stride;
            float sums[LANES] = {0}, products[LANES] = {0};
            const float *coming = coming_row(a, channel, sample);
            unpack_row(&a->x_hat, row, x_hat);
            for (int64_t i = 0; i < whole; i += LANES) {
                for (int64_t j = 0; j < LANES; j += LINE / 4) PREFETCH(coming + i + j);
                for (int64_t j = 0; j < LANES; j++) sums[j] += grad[i + j];
                for (int64_t j = 0; j < LANES; j++) products[j] += grad[i + j] * x_hat[i + j];
            }
            for (int64_t i = whole; i < n; i++) {
                sums[i - whole] += grad[i];
                products[i - whole] += grad[i] * x_hat[i];
            }
            sum += (double)sum_floats(sums), product += (double)sum_floats(products);
        }
        a->grad_beta[channel] = (float)sum;
        a->grad_gamma[channel] = (float)product;
        const double count = (double)(a->batch * n);
        const float scale = a->scale[channel];
        const float mean = a->by_batch ? (float)(sum / count) : 0.0f;
        const float projection = a->by_batch ? (float)(product / count) : 0.0f;
        for (int64_t sample = 0; sample < a->batch; sample++) {
            const int64_t row = sample * a->channels + channel;
            float *out = a->grad_input + row * n;
            const float *grad = a->grad + row * n;
            float *restrict x_hat = x + sample * stride;
            if (a->by_batch) {
                if (!stride) unpack_row(&a->x_hat, row, x_hat);
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
        float *x = malloc((size_t)(a->x_hat.n * (keeps_channel(a) ? a->batch : 1)) * 4);
        if (!x) {
            failed++;
            continue;
        }
        channel_gradients(a, a->channels * t / threads, a->channels * (t + 1) / threads, x);
        free(x);
    }
    return failed ? NO_MEMORY : DONE;
}
