/* Packed rows to floats. */
#include "native.h"
#include "unpack_row.h"

CLONED static void unpack_rows(const unpack_args *a, int64_t first, int64_t last, const row_scratch *s) {
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
        row_scratch s = {(float *)(void *)memory, memory + 4 * bytes, memory + 5 * bytes};
        unpack_rows(a, rows * t / threads, rows * (t + 1) / threads, &s);
        free(memory);
    }
    return failed ? NO_MEMORY : DONE;
}
