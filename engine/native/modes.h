/* Paging modes as rows of data (`struct mode`, as engine/translate/accelerated.py writes it), and what they say of an
 * entry. Put in front of the files that include it before they are compiled.
 */
#include <stddef.h>
#include <stdint.h>

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "entries are read as they stand in memory, lowest byte first"
#endif

#define PUBLIC __attribute__((visibility("default")))
#define INLINE static inline __attribute__((always_inline))
#define likely(x) __builtin_expect(!!(x), 1)
#define settled() __asm__ volatile("" ::: "memory") /* all stores are done before the next load, which may jump */
#define unlikely(x) __builtin_expect(!!(x), 0)

typedef uint64_t u64;
typedef uint8_t u8;
typedef u64 __attribute__((aligned(1), may_alias)) loose64;
typedef uint32_t __attribute__((aligned(1), may_alias)) loose32;
typedef uint16_t __attribute__((aligned(1), may_alias)) loose16;

/* -- the rows of a mode ---------------------------------------------------------------------------------------- */

#define PARTS 6
#define RULES 12
enum { ABSENT = 1, TABLE = 8, MALFORMED = 9, NOT_WALKED = 10, OTHER = 254, ASK = 255 };

struct part { u64 mask, left, right; };
struct rule { u64 mask, value, bits; };
struct kind {
    u64 mask, value;
    u64 plain; /* the mask of the address where nothing else has to be done, else 0 */
    u64 inside, page_bits, is_table, fault, invert;
    u64 parts, rights, flags, granted; /* how many; and what is granted whatever the entry */
    struct part part[PARTS];
    struct rule right[RULES], flag[RULES];
};
struct level { u64 shift, index_mask, kinds, first, tested; };
struct mode {
    u64 entry_size, levels;
    u64 low_last, has_low, high_first, has_high, ignored, top, other_first, other_last, has_other;
    struct level level[8];
    struct kind kind[];
};

INLINE const struct kind *kind_of(const struct mode *mode, const struct level *level, u64 entry)
{
    const struct kind *kind = mode->kind + level->first, *end = kind + level->kinds;
    for (; kind < end; kind++)
        if ((entry & kind->mask) == kind->value)
            return kind;
    return NULL;
}

INLINE u64 base_of(const struct kind *kind, u64 entry)
{
    u64 base = 0;
    if (likely(kind->plain))
        return entry & kind->plain;
    entry ^= kind->invert;
    for (u64 number = 0; number < kind->parts; number++)
        base |= (entry & kind->part[number].mask) << kind->part[number].left >> kind->part[number].right;
    return base;
}

INLINE u8 ruled(const struct rule *rule, u64 count, u64 entry)
{
    u64 found = 0;
    for (const struct rule *end = rule + count; rule < end; rule++)
        found |= (entry & rule->mask) == rule->value ? rule->bits : 0;
    return (u8)found;
}

INLINE u8 rights_of(const struct kind *kind, u64 entry)
{
    return (u8)(kind->granted | ruled(kind->right, kind->rights, entry));
}

INLINE int canonical(const struct mode *mode, u64 *address)
{
    u64 low = *address & ~mode->ignored, high = *address | mode->ignored;
    if (unlikely(*address > mode->top))
        return 0;
    if (unlikely(mode->has_other) && *address >= mode->other_first && *address <= mode->other_last)
        return 0;
    if (likely(mode->has_low && low <= mode->low_last))
        *address = low;
    else if (mode->has_high && high >= mode->high_first)
        *address = high;
    else
        return 0;
    return 1;
}
