/* Gradients of LayerNorm and RMSNorm: each row of x_hat is unpacked, used and forgotten. */
#include "native.h"
#include "unpack_row.h"

/* `x_hat` has room for a row. */
CLONED static void norm_rows(const norm_args *a, int64_t first, int64_t last, int64_t block, float *x_hat) {
    const int64_t n = a->x_hat.n;
    const float *restrict gamma = a->gamma;
    float *restrict grad_gamma = a->grad_gamma + block * n, *restrict grad_beta = a->grad_beta + block * n;
    memset(grad_gamma, 0, (size_t)n * 4);
    memset(grad_beta, 0, (size_t)n * 4);
    for (int64_t row = first; row < last; row++) {
        const float *restrict grad = a->grad + row * n;
        float *restrict out = a->grad_input + row * n;
        float sums[LANES] = {0}, products[LANES] = {0};
        int64_t whole = n / LANES * LANES;
        unpack_row(&a->x_hat, row, x_hat);
        for (int64_t i = 0; i < n; i++) {
            grad_gamma[i] += grad[i] * x_hat[i];
            grad_beta[i] += grad[i];
        }
        if (gamma) {
            for (int64_t i = 0; i < n; i++) out[i] = grad[i] * gamma[i];
        } else {
            memcpy(out, grad, (size_t)n * 4);
        }
        for (int64_t i = 0; i < whole; i += LANES) {
            for (int64_t j = 0; j < LANES; j++) sums[j] += out[i + j];
            for (int64_t j = 0; j < LANES; j++) products[j] += out[i + j] * x_hat[i + j];
        }
        for (int64_t i = whole; i < n; i++) {
            sums[i - whole] += out[i];
            products[i - whole] += out[i] * x_hat[i];
        }
        const float projection = sum_floats(products) / (float)n, rstd = a->rstd[row];
        const float mean = a->centred ? sum_floats(sums) / (float)n : 0.0f;
        for (int64_t i = 0; i < n; i++) out[i] = (out[i] - x_hat[i] * projection - mean) * rstd;
    }
}

EXPORTED int64_t hf_backrazor_norm(const norm_args *a) {
    int64_t rows = a->x_hat.rows, failed = 0, blocks = (rows + a->block - 1) / a->block;
    int64_t threads = smaller(a->threads, blocks);
#if defined(_OPENMP)
#pragma omp parallel for num_threads((int)(threads > 0 ? threads : 1)) schedule(static) reduction(+ : failed)
#endif
    for (int64_t t = 0; t < threads; t++) {
        float *x_hat = malloc((size_t)a->x_hat.n * 4);
        if (!x_hat) {
            failed++;
            continue;
        }
        for (int64_t block = blocks * t / threads; block < blocks * (t + 1) / threads; block++) {
            norm_rows(a, block * a->block, smaller((block + 1) * a->block, rows), block, x_hat);
        }
        free(x_hat);
    }
    return failed ? NO_MEMORY : DONE;
}
