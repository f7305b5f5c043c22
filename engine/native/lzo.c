/* LZO1X, decompression only: what engine/formats/kdump/lzo.py does, a page in microseconds.
 *
 * The packed bytes are hostile: nothing is read behind their end, nothing written behind the room that is given.
 * Source: Linux Documentation/staging/lzo.rst (the format, release 6.12).
 */
#include <stdint.h>
#include <string.h>

#define PUBLIC __attribute__((visibility("default")))

typedef uint64_t u64;
typedef uint8_t u8;

enum { TOO_SHORT = -1, TOO_LONG = -2, BEFORE_FIRST = -3 };
enum { AFTER_LITERALS = 4 };

#define need(count)                \
    do {                           \
        if (n - at < (u64)(count)) \
            return TOO_SHORT;      \
    } while (0)
#define room(count)                       \
    do {                                  \
        if (size - made < (u64)(count))   \
            return TOO_LONG;              \
    } while (0)
#define literals(count)                 \
    do {                                \
        need(count);                    \
        room(count);                    \
        memcpy(out + made, in + at, count); \
        at += count;                    \
        made += count;                  \
    } while (0)
#define extended(base)                \
    do {                              \
        if (!length) {                \
            length = (base);          \
            for (;; length += 255) {  \
                need(1);              \
                if (in[at++])         \
                    break;            \
            }                         \
            length += in[at - 1];     \
        }                             \
    } while (0)

/* Unpack `n` bytes until there are `most` of at most `size`; gives how many there are, or what is wrong. */
PUBLIC int64_t cloudfs_lzo1x(const u8 *in, u64 n, u8 *out, u64 size, u64 most)
{
    u64 at = 0, made = 0, state = 0, length, distance;
    need(1);
    if (in[0] > 17) {
        at = 1;
        length = in[0] - 17u;
        literals(length);
        state = length < AFTER_LITERALS ? length : AFTER_LITERALS;
    }
    while (made < most) {
        need(1);
        unsigned code = in[at++];
        if (code >= 64) {
            need(1);
            length = (code >> 5) + 1;
            distance = ((u64)in[at++] << 3) + (code >> 2 & 7) + 1;
            state = code & 3;
        } else if (code >= 16) {
            unsigned wide = code >= 32, word;
            length = code & (wide ? 31 : 7);
            extended(wide ? 31 : 7);
            need(2);
            word = in[at] | (unsigned)in[at + 1] << 8;
            at += 2;
            length += 2;
            state = word & 3;
            distance = (word >> 2) + 1;
            if (!wide) {
                distance += ((code & 8) << 11) + 16384 - 1;
                if (distance == 16384)
                    return (int64_t)made;
            }
        } else if (state) {
            need(1);
            length = state == AFTER_LITERALS ? 3 : 2;
            distance = (code >> 2) + ((u64)in[at++] << 2) + (state == AFTER_LITERALS ? 2049 : 1);
            state = code & 3;
        } else {
            length = code;
            extended(15);
            length += 3;
            literals(length);
            state = AFTER_LITERALS;
            continue;
        }
        if (distance > made)
            return BEFORE_FIRST;
        room(length);
        if (distance >= length) {
            memcpy(out + made, out + made - distance, length);
            made += length;
        } else {
            for (u64 stop = made + length; made < stop; made++)
                out[made] = out[made - distance];
        }
        if (state)
            literals(state);
    }
    return (int64_t)made;
}
