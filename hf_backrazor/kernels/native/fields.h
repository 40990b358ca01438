/* Fields of 1 to 4 bits, one a byte, to dense bytes and back: `packing/bits.py`. */
#ifndef HF_BACKRAZOR_FIELDS_H
#define HF_BACKRAZOR_FIELDS_H

#include "native.h"

/* Buffers of single fields have this many bytes beyond n, all zero, so that whole words can be read and written. */
#define SLACK 16

INLINED int64_t width_of(int64_t n, int64_t width) { return (n * width + 7) / 8; }

/* Eight bytes of 0 or 1 to one byte. */
INLINED void pack_1(const uint8_t *restrict from, int64_t n, uint8_t *restrict to) {
    for (int64_t i = 0; i < width_of(n, 1); i++) {
        uint64_t w;
        memcpy(&w, from + 8 * i, 8);
        to[i] = (uint8_t)((w * 0x0102040810204080ull) >> 56);
    }
}

INLINED void pack_2(const uint8_t *restrict from, int64_t n, uint8_t *restrict to) {
    for (int64_t i = 0; i < width_of(n, 2); i++) {
        uint32_t w;
        memcpy(&w, from + 4 * i, 4);
        to[i] = (uint8_t)(w | w >> 6 | w >> 12 | w >> 18);
    }
}

INLINED void pack_4(const uint8_t *restrict from, int64_t n, uint8_t *restrict to) {
    for (int64_t i = 0; i < width_of(n, 4); i++) {
        uint16_t w;
        memcpy(&w, from + 2 * i, 2);
        to[i] = (uint8_t)(w | w >> 4);
    }
}

INLINED void unpack_1(const uint8_t *restrict from, int64_t n, uint8_t *restrict to) {
    for (int64_t i = 0; i < width_of(n, 1); i++) {
        uint64_t w = from[i] * 0x0101010101010101ull & 0x8040201008040201ull;
        w = (w + 0x7f7f7f7f7f7f7f7full) >> 7 & 0x0101010101010101ull;
        memcpy(to + 8 * i, &w, 8);
    }
}

INLINED void unpack_2(const uint8_t *restrict from, int64_t n, uint8_t *restrict to) {
    for (int64_t i = 0; i < width_of(n, 2); i++) {
        uint32_t b = from[i], w = (b | b << 6 | b << 12 | b << 18) & 0x03030303u;
        memcpy(to + 4 * i, &w, 4);
    }
}

INLINED void unpack_4(const uint8_t *restrict from, int64_t n, uint8_t *restrict to) {
    for (int64_t i = 0; i < width_of(n, 4); i++) {
        uint16_t b = from[i], w = (uint16_t)((b | b << 4) & 0x0f0f);
        memcpy(to + 2 * i, &w, 2);
    }
}

/* Codes of 1 to 4 bits; three are a plane of two and one of one. `plane`: n + SLACK bytes for that. Both `codes` and
 * `plane` are changed beyond n. */
INLINED void pack_codes(uint8_t *restrict codes, int64_t n, int64_t bits, uint8_t *restrict plane, uint8_t *restrict to) {
    memset(codes + n, 0, SLACK);
    if (bits == 1) {
        pack_1(codes, n, to);
    } else if (bits == 2) {
        pack_2(codes, n, to);
    } else if (bits == 4) {
        pack_4(codes, n, to);
    } else {
        for (int64_t i = 0; i < n; i++) plane[i] = codes[i] & 3;
        memset(plane + n, 0, SLACK);
        pack_2(plane, n, to);
        for (int64_t i = 0; i < n; i++) plane[i] = codes[i] >> 2;
        pack_1(plane, n, to + width_of(n, 2));
    }
}

INLINED void unpack_codes(const uint8_t *restrict from, int64_t n, int64_t bits, uint8_t *restrict plane,
                          uint8_t *restrict codes) {
    if (bits == 1) {
        unpack_1(from, n, codes);
    } else if (bits == 2) {
        unpack_2(from, n, codes);
    } else if (bits == 4) {
        unpack_4(from, n, codes);
    } else {
        unpack_2(from, n, codes);
        unpack_1(from + width_of(n, 2), n, plane);
        for (int64_t i = 0; i < n; i++) codes[i] = (uint8_t)(codes[i] | plane[i] << 2);
    }
}

/* Which of the 2^bits values each code stands for. A tree of choices between variables vectorises; a table in memory
 * does not. */
INLINED void look_up(const uint8_t *restrict codes, int64_t n, int64_t bits, const float *restrict values,
                     float *restrict to) {
    float v[16] = {0};
    for (int64_t j = 0; j < (int64_t)1 << bits; j++) v[j] = values[j];
    const float v0 = v[0], v1 = v[1], v2 = v[2], v3 = v[3], v4 = v[4], v5 = v[5], v6 = v[6], v7 = v[7];
    const float v8 = v[8], v9 = v[9], v10 = v[10], v11 = v[11], v12 = v[12], v13 = v[13], v14 = v[14], v15 = v[15];
    if (bits == 1) {
        for (int64_t i = 0; i < n; i++) to[i] = codes[i] ? v1 : v0;
    } else if (bits == 2) {
        for (int64_t i = 0; i < n; i++) {
            const uint32_t c = codes[i];
            const float a = c & 1 ? v1 : v0, b = c & 1 ? v3 : v2;
            to[i] = c & 2 ? b : a;
        }
    } else if (bits == 3) {
        for (int64_t i = 0; i < n; i++) {
            const uint32_t c = codes[i];
            const float a = c & 1 ? v1 : v0, b = c & 1 ? v3 : v2, d = c & 1 ? v5 : v4, e = c & 1 ? v7 : v6;
            const float f = c & 2 ? b : a, g = c & 2 ? e : d;
            to[i] = c & 4 ? g : f;
        }
    } else {
        for (int64_t i = 0; i < n; i++) {
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
