/* Walks of page tables as one writes them in C, for comparison with the engine's: no bounds, no faults, no reports.
 *
 * walk_hard, tree_hard: x86-64 with four levels, written out. walk_rows, tree_rows: any mode, by the rows of data that
 * the engine's walks are fed with. Memory is one flat array whose first byte is physical address 0.
 */
#include <stdint.h>
#include <stddef.h>
#include <string.h>

typedef uint64_t u64;

struct kind { u64 mask, value, address, inside; };            /* inside: 0 of a table, else page size - 1 */
struct level { u64 shift, index, kinds; struct kind kind[4]; };
struct mode { u64 levels; struct level level[5]; };

#define ADDRESS 0x000FFFFFFFFFF000u
#define ENTRY(table, address, shift) (*(const u64 *)(memory + (table) + ((address) >> (shift) & 511) * 8))

static u64 hard(const char *memory, u64 dtb, u64 address)
{
    u64 entry = ENTRY(dtb & ADDRESS, address, 39);
    if (!(entry & 1))
        return ~(u64)0;
    entry = ENTRY(entry & ADDRESS, address, 30);
    if (!(entry & 1))
        return ~(u64)0;
    if (entry & 128)
        return (entry & ADDRESS & ~(u64)0x3FFFFFFF) | (address & 0x3FFFFFFF);
    entry = ENTRY(entry & ADDRESS, address, 21);
    if (!(entry & 1))
        return ~(u64)0;
    if (entry & 128)
        return (entry & ADDRESS & ~(u64)0x1FFFFF) | (address & 0x1FFFFF);
    entry = ENTRY(entry & ADDRESS, address, 12);
    return entry & 1 ? (entry & ADDRESS) | (address & 0xFFF) : ~(u64)0;
}

static inline __attribute__((always_inline)) const struct kind *match(const struct level *level, u64 entry)
{
    for (u64 number = 0; number < level->kinds; number++)
        if ((entry & level->kind[number].mask) == level->kind[number].value)
            return entry ? level->kind + number : NULL;
    return NULL;
}

static inline __attribute__((always_inline)) u64 rows(const char *memory, const struct mode *mode, u64 dtb, u64 address)
{
    u64 table = dtb;
    for (u64 number = 0; number < mode->levels; number++) {
        const struct level *level = mode->level + number;
        u64 entry = *(const u64 *)(memory + table + (address >> level->shift & level->index) * 8);
        const struct kind *kind = match(level, entry);
        if (!kind)
            return ~(u64)0;
        if (kind->inside)
            return (entry & kind->address) | (address & kind->inside);
        table = entry & kind->address;
    }
    return ~(u64)0;
}

void walk_hard(const char *memory, u64 dtb, const u64 *addresses, u64 count, u64 *out)
{
    for (u64 row = 0; row < count; row++)
        out[row] = hard(memory, dtb, addresses[row]);
}

void walk_rows(const char *memory, const struct mode *mode, u64 dtb, const u64 *addresses, u64 count, u64 *out)
{
    for (u64 row = 0; row < count; row++)
        out[row] = rows(memory, mode, dtb, addresses[row]);
}

/* (start, physical address, log2 of the size) of every leaf of the lower half; gives how many there are. */
static u64 list_hard(const char *memory, u64 table, u64 start, int shift, u64 *out, u64 count)
{
    u64 last = shift == 39 ? 256 : 512;
    for (u64 index = 0; index < last; index++) {
        u64 entry = *(const u64 *)(memory + table + index * 8), at = start + (index << shift);
        if (!(entry & 1))
            continue;
        if (shift == 12 || (entry & 128)) {
            out[3 * count] = at;
            out[3 * count + 1] = entry & ADDRESS & ~(((u64)1 << shift) - 1);
            out[3 * count++ + 2] = (u64)shift;
        } else {
            count = list_hard(memory, entry & ADDRESS, at, shift - 9, out, count);
        }
    }
    return count;
}

u64 tree_hard(const char *memory, u64 dtb, u64 *out) { return list_hard(memory, dtb & ADDRESS, 0, 39, out, 0); }

static u64 list_rows(const char *memory, const struct mode *mode, u64 number, u64 table, u64 start, u64 *out, u64 count)
{
    const struct level *level = mode->level + number;
    u64 last = number ? level->index + 1 : (level->index + 1) / 2;
    for (u64 index = 0; index < last; index++) {
        u64 entry = *(const u64 *)(memory + table + index * 8), at = start + (index << level->shift);
        const struct kind *kind = match(level, entry);
        if (!kind)
            continue;
        if (kind->inside) {
            out[3 * count] = at;
            out[3 * count + 1] = entry & kind->address;
            out[3 * count++ + 2] = level->shift;
        } else {
            count = list_rows(memory, mode, number + 1, entry & kind->address, at, out, count);
        }
    }
    return count;
}

u64 tree_rows(const char *memory, const struct mode *mode, u64 dtb, u64 *out)
{
    return list_rows(memory, mode, 0, dtb, 0, out, 0);
}

/* `count` pages from `address` on, translated by rows and copied. */
void read_rows(const char *memory, const struct mode *mode, u64 dtb, u64 address, u64 count, char *out)
{
    for (u64 page = 0; page < count; page++)
        memcpy(out + page * 4096, memory + rows(memory, mode, dtb, address + page * 4096), 4096);
}
