/* One packed row to floats. */
#ifndef HF_BACKRAZOR_UNPACK_ROW_H
#define HF_BACKRAZOR_UNPACK_ROW_H

#include <math.h>

#include "fields.h"
#include "index.h"
#include "native.h"
#include "rotation.h"

/* gain x + offset within the limits, of one row. */
typedef struct {
    float gain, offset, low, high;
    int scaled, shifted, limited;
} row_map;

INLINED row_map map_of_row(const unpack_args *a, int64_t row) {
    row_map m = {.gain = a->gain ? a->gain[row] : 1.0f, .offset = a->offset ? a->offset[row] : 0.0f};
    m.low = a->low, m.high = a->high;
    m.scaled = a->gain != NULL, m.shifted = a->offset != NULL;
    m.limited = a->low > -INFINITY || a->high < INFINITY;
    return m;
}

/* As torch does it: nothing is added where there is no offset, and NaN stays NaN. */
INLINED float mapped(const row_map *m, float x) {
    if (m->scaled) x = x * m->gain;
    if (m->shifted) x = x + m->offset;
    if (m->limited) {
        x = x < m->low ? m->low : x;
        x = x > m->high ? m->high : x;
    }
    return x;
}

/* Codes stand for few values in a row, so mapping these is all it takes; of rows that are turned back, and with a base or a
 * centre, every element. */
INLINED void unpack_row(const unpack_args *a, int64_t row, float *restrict x) {
    const int64_t n = a->n;
    const row_map map = map_of_row(a, row);
    const int maps = map.scaled || map.shifted || map.limited, late = maps && (a->keep_base || a->centre || a->rotated);
    if (a->bits) {
        float values[16] = {0};
        const float scale = a->scale ? from_bfloat16(a->scale[row]) : 1.0f;
        for (int64_t j = 0; j < (int64_t)1 << a->bits; j++) {
            values[j] = a->levels[j] * scale;
            if (maps && !late) values[j] = mapped(&map, values[j]);
        }
        const uint8_t *fields = a->fields + row * a->fields_stride;
        for (int64_t start = 0; start < n; start += PORTION) {
            uint8_t codes[PORTION];
            float last[PORTION];
            const int full = n - start >= PORTION;
            read_codes(fields, start, n, a->bits, codes);
            look_up(codes, a->bits, values, full ? x + start : last);
            if (!full) memcpy(x + start, last, (size_t)(n - start) * 4);
        }
        if (a->rotated) rotate_row(x, n, 1);
    } else if (!a->keep_base) {
        const float zero = maps && !late ? mapped(&map, 0.0f) : 0.0f;
        for (int64_t i = 0; i < n; i++) x[i] = zero;
    }
    if (a->k) {
        const uint8_t *index = a->index + row * a->index_stride;
        FOR_EACH_KEPT(index, n, a->k, a->coding, i, j, {
            const float value = read_value(a->values, a->value_dtype, row * a->k + j);
            x[i] = maps && !late ? mapped(&map, value) : value;
        });
    }
    if (a->centre) {
        const uint16_t *centre = a->centre + (a->first + row) / a->group * n;
        for (int64_t i = 0; i < n; i++) x[i] += from_bfloat16(centre[i]);
    }
    if (late) {
        for (int64_t i = 0; i < n; i++) x[i] = mapped(&map, x[i]);
    }
}

#endif
