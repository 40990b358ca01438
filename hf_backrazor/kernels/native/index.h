/* Places of kept elements: `packing/index.py`. */
#ifndef HF_BACKRAZOR_INDEX_H
#define HF_BACKRAZOR_INDEX_H

#include "fields.h"
#include "native.h"

INLINED uint32_t read_number(const uint8_t *from, int64_t i, int64_t size) {
    uint32_t number;
    uint16_t half;
    if (size == 4) {
        memcpy(&number, from + 4 * i, 4);
        return number;
    }
    if (size == 2) {
        memcpy(&half, from + 2 * i, 2);
        return half;
    }
    return from[i];
}

INLINED float read_value(const void *values, int64_t dtype, int64_t at) {
    if (dtype == FLOAT32) return ((const float *)values)[at];
    if (dtype == BFLOAT16) return from_bfloat16(((const uint16_t *)values)[at]);
#ifdef __FLT16_MAX__
    return (float)((const _Float16 *)values)[at];
#else
    return 0.0f;
#endif
}

/* Run a statement for every kept element of a row: the `j`-th of them at place `i`. Places beyond the row, which no
 * packed tensor has, are passed over. */
#define FOR_EACH_KEPT(index, n, k, coding, i, j, ...)                                                         \
    do {                                                                                                       \
        int64_t i, j = 0;                                                                                      \
        if ((coding) == MASK) {                                                                                \
            for (int64_t byte_ = 0; byte_ < width_of(n, 1); byte_++) {                                         \
                uint32_t bits_ = (index)[byte_];                                                               \
                for (i = 8 * byte_; bits_ && i < (n); i++, bits_ >>= 1) {                                      \
                    if (bits_ & 1 && j < (k)) {                                                                \
                        __VA_ARGS__;                                                                           \
                        j++;                                                                                   \
                    }                                                                                          \
                }                                                                                              \
            }                                                                                                  \
        } else if ((coding) == POSITIONS) {                                                                    \
            for (; j < (k); j++) {                                                                             \
                i = read_number(index, j, position_size(n));                                                   \
                if (i < (n)) {                                                                                 \
                    __VA_ARGS__;                                                                               \
                }                                                                                              \
            }                                                                                                  \
        } else if ((coding) == OFFSETS) {                                                                      \
            int64_t blocks_ = ((n)-1) / BLOCK, size_ = position_size((k) + 1);                                 \
            for (int64_t block_ = 0; block_ <= blocks_; block_++) {                                            \
                int64_t end_ = block_ < blocks_ ? smaller(read_number(index, block_, size_), k) : (k);         \
                for (; j < end_; j++) {                                                                        \
                    i = block_ * BLOCK + (index)[blocks_ * size_ + j];                                         \
                    if (i < (n)) {                                                                             \
                        __VA_ARGS__;                                                                           \
                    }                                                                                          \
                }                                                                                              \
            }                                                                                                  \
        }                                                                                                      \
    } while (0)

#endif
