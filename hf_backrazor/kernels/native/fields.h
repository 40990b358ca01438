/* Fields of 1 to 4 bits, one a byte, to dense bytes and back: `packing/bits.py`. */
#ifndef HF_BACKRAZOR_FIELDS_H
#define HF_BACKRAZOR_FIELDS_H

#include "native.h"

INLINED int64_t width_of(int64_t n, int64_t width) { return (n * width + 7) / 8; }

/* A portion's fields of one width. */

/* Eight bytes of 0 or 1 to one byte. */
INLINED void pack_1(const uint8_t *restrict from, uint8_t *restrict to) {
    for (int i = 0; i < PORTION / 8; i++) {
        uint64_t w;
        memcpy(&w, from + 8 * i, 8);
        to[i] = (uint8_t)((w * 0x0102040810204080ull) >> 56);
    }
}

INLINED void pack_2(const uint8_t *restrict from, uint8_t *restrict to) {
    for (int i = 0; i < PORTION / 4; i++) {
        uint32_t w;
        memcpy(&w, from + 4 * i, 4);
        to[i] = (uint8_t)(w | w >> 6 | w >> 12 | w >> 18);
    }
}

INLINED void pack_4(const uint8_t *restrict from, uint8_t *restrict to) {
    for (int i = 0; i < PORTION / 2; i++) {
        uint16_t w;
        memcpy(&w, from + 2 * i, 2);
        to[i] = (uint8_t)(w | w >> 4);
    }
}

INLINED void unpack_1(const uint8_t *restrict from, uint8_t *restrict to) {
    for (int i = 0; i < PORTION / 8; i++) {
        uint64_t w = from[i] * 0x0101010101010101ull & 0x8040201008040201ull;
        w = (w + 0x7f7f7f7f7f7f7f7full) >> 7 & 0x0101010101010101ull;
        memcpy(to + 8 * i, &w, 8);
    }
}

INLINED void unpack_2(const uint8_t *restrict from, uint8_t *restrict to) {
    for (int i = 0; i < PORTION / 4; i++) {
        uint32_t b = from[i], w = (b | b << 6 | b << 12 | b << 18) & 0x03030303u;
        memcpy(to + 4 * i, &w, 4);
    }
}

INLINED void unpack_4(const uint8_t *restrict from, uint8_t *restrict to) {
    for (int i = 0; i < PORTION / 2; i++) {
        uint16_t b = from[i], w = (uint16_t)((b | b << 4) & 0x0f0f);
        memcpy(to + 2 * i, &w, 2);
    }
}

/* Of a row of n codes, the portion that begins at `start`. Three bits are a plane of two and, behind it, one of one. A
 * last portion that is not full has zeros in `codes` beyond the row; of `fields`, nothing beyond is touched. */
INLINED void write_codes(const uint8_t *restrict codes, int64_t start, int64_t n, int64_t bits, uint8_t *fields) {
    uint8_t last[PORTION / 2];
    const int full = n - start >= PORTION;
    const int64_t count = full ? PORTION : n - start, main = bits == 3 ? 2 : bits;
    uint8_t *to = fields + start / 8 * main;
    uint8_t *into = full ? to : last;
    if (main == 1) {
        pack_1(codes, into);
    } else if (main == 4) {
        pack_4(codes, into);
    } else if (bits == 2) {
        pack_2(codes, into);
    } else {
        uint8_t low[PORTION];
        for (int i = 0; i < PORTION; i++) low[i] = codes[i] & 3;
        pack_2(low, into);
    }
    if (!full) memcpy(to, last, (size_t)width_of(count, main));
    if (bits == 3) {
        uint8_t high[PORTION];
        to = fields + width_of(n, 2) + start / 8;
        into = full ? to : last;
        for (int i = 0; i < PORTION; i++) high[i] = codes[i] >> 2;
        pack_1(high, into);
        if (!full) memcpy(to, last, (size_t)width_of(count, 1));
    }
}

INLINED void read_codes(const uint8_t *fields, int64_t start, int64_t n, int64_t bits, uint8_t *restrict codes) {
    uint8_t last[PORTION / 2] = {0};
    const int full = n - start >= PORTION;
    const int64_t count = full ? PORTION : n - start, main = bits == 3 ? 2 : bits;
    const uint8_t *from = fields + start / 8 * main;
    if (!full) from = memcpy(last, from, (size_t)width_of(count, main));
    if (main == 1) {
        unpack_1(from, codes);
    } else if (main == 2) {
        unpack_2(from, codes);
    } else {
        unpack_4(from, codes);
    }
    if (bits == 3) {
        uint8_t high[PORTION];
        from = fields + width_of(n, 2) + start / 8;
        if (!full) from = memcpy(last, from, (size_t)width_of(count, 1));
        unpack_1(from, high);
        for (int i = 0; i < PORTION; i++) codes[i] = (uint8_t)(codes[i] | high[i] << 2);
    }
}

/* Which of the 2^bits values each code of a portion stands for. A tree of choices between variables vectorises; a table
 * in memory does not. */
INLINED void look_up(const uint8_t *restrict codes, int64_t bits, const float *restrict values, float *restrict to) {
    const float v0 = values[0], v1 = values[1], v2 = values[2], v3 = values[3], v4 = values[4], v5 = values[5];
    const float v6 = values[6], v7 = values[7], v8 = values[8], v9 = values[9], v10 = values[10], v11 = values[11];
    const float v12 = values[12], v13 = values[13], v14 = values[14], v15 = values[15];
    if (bits == 1) {
        for (int i = 0; i < PORTION; i++) to[i] = codes[i] ? v1 : v0;
    } else if (bits == 2) {
        for (int i = 0; i < PORTION; i++) {
            const uint32_t c = codes[i];
            const float a = c & 1 ? v1 : v0, b = c & 1 ? v3 : v2;
            to[i] = c & 2 ? b : a;
        }
    } else if (bits == 3) {
        for (int i = 0; i < PORTION; i++) {
            const uint32_t c = codes[i];
            const float a = c & 1 ? v1 : v0, b = c & 1 ? v3 : v2, d = c & 1 ? v5 : v4, e = c & 1 ? v7 : v6;
            const float f = c & 2 ? b : a, g = c & 2 ? e : d;
            to[i] = c & 4 ? g : f;
        }
    } else {
        for (int i = 0; i < PORTION; i++) {
            const uint32_t c = codes[i];
            const float a = c & 1 ? v1 : v0, b = c & 1 ? v3 : v2, d = c & 1 ? v5 : v4, e = c & 1 ? v7 : v6;
            const float f = c & 1 ? v9 : v8, g = c & 1 ? v11 : v10, h = c & 1 ? v13 : v12, k = c & 1 ? v15 : v14;
            const float l = c & 2 ? b : a, m = c & 2 ? e : d, o = c & 2 ? g : f, p = c & 2 ? k : h;
            const float q = c & 4 ? m : l, r = c & 4 ? p : o;
            to[i] = c & 8 ? r : q;
        }
    }
}

#endif
