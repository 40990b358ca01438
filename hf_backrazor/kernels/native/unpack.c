/* Packed rows to floats. */
#include "native.h"
#include "unpack_row.h"

/* `x` has room for a row. */
CLONED static void unpack_rows(const unpack_args *a, int64_t first, int64_t last, float *x) {
    int64_t n = a->n;
    for (int64_t row = first; row < last; row++) {
        if (a->accumulate) {
            float *restrict sum = (float *)a->out + row * n;
            const float sign = (float)a->accumulate;
            unpack_row(a, row, x);
            for (int64_t i = 0; i < n; i++) sum[i] += sign * x[i];
            continue;
        }
        if (a->out_dtype == FLOAT32) {
            unpack_row(a, row, (float *)a->out + row * n);
            continue;
        }
        uint16_t *out = (uint16_t *)a->out + row * n;
        if (a->keep_base) {
            for (int64_t i = 0; i < n; i++) x[i] = from_bfloat16(out[i]);
        }
        unpack_row(a, row, x);
        for (int64_t i = 0; i < n; i++) out[i] = to_bfloat16(x[i]);
    }
}

EXPORTED int64_t hf_backrazor_unpack(const unpack_args *a) {
    int64_t rows = a->rows, failed = 0, threads = smaller(a->threads, rows);
#if defined(_OPENMP)
#pragma omp parallel for num_threads((int)(threads > 0 ? threads : 1)) schedule(static) reduction(+ : failed)
#endif
    for (int64_t t = 0; t < threads; t++) {
        float *x = malloc((size_t)a->n * 4);
        if (!x) {
            failed++;
            continue;
        }
        unpack_rows(a, rows * t / threads, rows * (t + 1) / threads, x);
        free(x);
    }
    return failed ? NO_MEMORY : DONE;
}
