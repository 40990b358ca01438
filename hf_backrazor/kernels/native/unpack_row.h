/* One packed row to floats. */
#ifndef HF_BACKRAZOR_UNPACK_ROW_H
#define HF_BACKRAZOR_UNPACK_ROW_H

#include "fields.h"
#include "index.h"
#include "native.h"

typedef struct {
    float *x; /* the row */
    uint8_t *codes;
    uint8_t *plane;
} row_scratch;

INLINED void unpack_row(const unpack_args *a, int64_t row, const row_scratch *s, float *restrict x) {
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

#endif
