/* Reads through address spaces that stand on one another: a process in a guest, its guest, a process in that, down to
 * a file or the memory of a process of this host.
 *
 * Knows nothing of Python, and decides nothing: whatever is not the usual case (a page that is absent, a range that is
 * left, an error, a process that is not the same afterwards) is left to whoever asked, by the answer 0. Of what is read
 * nothing is remembered but within one call.
 */
#define _GNU_SOURCE
#include <poll.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#include "modes.h"

enum { GROUND, RANGES, SPACE };
enum { FLOORS = 12, LEVELS = 8, TABLE_BYTES = 4096, NEAR = 4096, ENTRIES = 512, MEM_BYTES = 32 << 10 };

struct range { u64 base, size, real; };
/* What has to stand in the memory below a space, or it was not the one that it was taken for. */
struct word { u64 address, size, value; };

/* GROUND: a descriptor, its process's pagemap (or -1), the shift of its pages: only what is present is read; a pidfd
 * and the PID (or 0) for long pieces, which may be read by that. RANGES: where they stand, and how many. SPACE: its mode, its DTB. The floor below is the next one. */
struct floor {
    u64 kind, one, two, three;
    union { const struct word *words; u64 pidfd; };
    union { u64 word_count, pid; };
};

/* The tables that a space was walked through last, one for each level but the first, by the bits of the address that
 * lead there (and 1, so that 0 is none); the entries of the last one, for a call that asks for more than a page. */
struct memo { u64 key[LEVELS], table[LEVELS], loaded; u8 entries[TABLE_BYTES]; };
struct work { const struct floor *floors; u64 count; int many; struct memo memo[FLOORS]; };

static int fetch(struct work *work, u64 number, u64 address, u8 *out, u64 size);

/* -- the ground ------------------------------------------------------------------------------------------------- */

static int present(int pagemap, unsigned shift, u64 address, u64 size)
{
    u64 entries[ENTRIES], first = address >> shift, left = ((address + size - 1) >> shift) - first + 1;
    while (left) {
        u64 part = left < ENTRIES ? left : ENTRIES;
        ssize_t length = (ssize_t)(part * sizeof *entries);
        if (pread(pagemap, entries, (size_t)length, (off_t)(first * sizeof *entries)) != length)
            return 0;
        for (u64 index = 0; index < part; index++)
            if (!(entries[index] >> 63))
                return 0;
        first += part;
        left -= part;
    }
    return 1;
}

/* By process_vm_readv, which is faster; and a look at whether the PID still means that process, and its memory. */
static int by_pid(const struct floor *floor, int pagemap, u64 address, u8 *out, u64 size)
{
    struct iovec here = {out, size}, remote = {(void *)(uintptr_t)address, size};
    struct pollfd watched = {(int)floor->pidfd, POLLIN, 0};
    u64 entry;
    return syscall(SYS_process_vm_readv, (pid_t)floor->pid, &here, 1, &remote, 1, 0) == (long)size &&
           pread(pagemap, &entry, sizeof entry, 0) == sizeof entry && poll(&watched, 1, 0) == 0;
}

static int from_ground(const struct floor *floor, u64 address, u8 *out, u64 size)
{
    int pagemap = (int)(int64_t)floor->two;
    if (pagemap >= 0 && !present(pagemap, (unsigned)floor->three, address, size))
        return 0;
    if (size > MEM_BYTES && floor->pid)
        return by_pid(floor, pagemap, address, out, size);
    return pread((int)floor->one, out, size, (off_t)address) == (ssize_t)size;
}

/* -- ranges ----------------------------------------------------------------------------------------------------- */

static int from_ranges(struct work *work, u64 number, u64 address, u8 *out, u64 size)
{
    const struct floor *floor = work->floors + number;
    const struct range *ranges = (const void *)(uintptr_t)floor->one;
    while (size) {
        u64 low = 0, high = floor->two, offset, step;
        while (high - low > 1) {
            u64 middle = (low + high) / 2;
            if (ranges[middle].base <= address)
                low = middle;
            else
                high = middle;
        }
        offset = address - ranges[low].base; /* wraps below the first: too large then */
        if (!floor->two || offset >= ranges[low].size)
            return 0;
        step = ranges[low].size - offset < size ? ranges[low].size - offset : size;
        if (!fetch(work, number + 1, ranges[low].real + offset, out, step))
            return 0;
        address += step;
        out += step;
        size -= step;
    }
    return 1;
}

/* -- spaces ----------------------------------------------------------------------------------------------------- */

static int entry_at(struct work *work, u64 number, const struct mode *mode, u64 table, u64 index, int last, u64 *entry)
{
    struct memo *memo = work->memo + number;
    u64 size = mode->entry_size;
    *entry = 0;
    if (last && work->many && (mode->level[mode->levels - 1].index_mask + 1) * size <= TABLE_BYTES) {
        if (memo->loaded != table + 1) {
            memo->loaded = 0;
            if (!fetch(work, number + 1, table, memo->entries, TABLE_BYTES))
                return 0;
            memo->loaded = table + 1;
        }
        memcpy(entry, memo->entries + index * size, size);
        return 1;
    }
    return fetch(work, number + 1, table + index * size, (u8 *)entry, size);
}

/* Where an address lies below, and the last byte of its page; 0 where that is not plain. */
static int find(struct work *work, u64 number, u64 address, u64 *below, u64 *inside)
{
    const struct mode *mode = (const void *)(uintptr_t)work->floors[number].one;
    struct memo *memo = work->memo + number;
    u64 table = work->floors[number].two, level = mode->levels - 1, last = level;
    if (!canonical(mode, &address) || mode->entry_size > sizeof table || mode->levels > LEVELS)
        return 0;
    while (level && memo->key[level] != (address >> mode->level[level - 1].shift) + 1)
        level--;
    if (level)
        table = memo->table[level];
    for (;; level++) {
        const struct level *row = mode->level + level;
        const struct kind *kind;
        u64 entry;
        if (!entry_at(work, number, mode, table, address >> row->shift & row->index_mask, level == last, &entry))
            return 0;
        kind = entry ? kind_of(mode, row, entry) : NULL;
        if (!kind || kind->fault)
            return 0;
        table = base_of(kind, entry);
        if (!kind->is_table) {
            *below = (table & ~kind->inside) | (address & kind->inside);
            *inside = kind->inside;
            return 1;
        }
        if (level == last)
            return 0;
        memo->key[level + 1] = (address >> row->shift) + 1;
        memo->table[level + 1] = table;
    }
}

static int from_space(struct work *work, u64 number, u64 address, u8 *out, u64 size)
{
    u64 run = 0, length = 0, below, inside, step;
    u8 *to = out;
    while (size) {
        if (!find(work, number, address, &below, &inside))
            return 0;
        step = inside - (address & inside) + 1;
        if (!step || step > size)
            step = size;
        if (length && below == run + length) {
            length += step;
        } else {
            if (length && !fetch(work, number + 1, run, to, length))
                return 0;
            to += length;
            run = below;
            length = step;
        }
        address += step;
        size -= step;
    }
    return !length || fetch(work, number + 1, run, to, length);
}

static int fetch(struct work *work, u64 number, u64 address, u8 *out, u64 size)
{
    const struct floor *floor = work->floors + number;
    if (number >= work->count || !size || address + size - 1 < address)
        return 0;
    switch (floor->kind) {
    case GROUND: return from_ground(floor, address, out, size);
    case RANGES: return from_ranges(work, number, address, out, size);
    default: return from_space(work, number, address, out, size);
    }
}

/* -- whether all are the same still -------------------------------------------------------------------------------- */

/* The words of one space: those that lie near one another in one read. */
static int same(struct work *work, u64 number)
{
    const struct floor *floor = work->floors + number;
    u8 bytes[NEAR];
    for (u64 first = 0; first < floor->word_count;) {
        const struct word *words = floor->words;
        u64 start = words[first].address, next = first, size = 0;
        do
            size = words[next].address - start + words[next].size;
        while (++next < floor->word_count && words[next].address >= start &&
               words[next].address - start + words[next].size <= NEAR - (start & (NEAR - 1)));
        if (size > NEAR || !fetch(work, number + 1, start, bytes, size))
            return 0;
        for (; first < next; first++) {
            u64 found = 0;
            memcpy(&found, bytes + (words[first].address - start), words[first].size);
            if (found != words[first].value)
                return 0;
        }
    }
    return 1;
}

static void forget(struct work *work)
{
    for (u64 number = 0; number < work->count; number++) {
        memset(work->memo[number].key, 0, sizeof work->memo[number].key);
        work->memo[number].loaded = 0;
    }
}

static int begun(struct work *work, const struct floor *floors, u64 count, int many)
{
    if (!count || count > FLOORS)
        return 0;
    work->floors = floors;
    work->count = count;
    work->many = many;
    forget(work);
    return 1;
}

static int all_same(struct work *work)
{
    work->many = 0;
    forget(work); /* what tells whether a process is the same is read anew, tables and all */
    for (u64 number = 0; number < work->count; number++)
        if (work->floors[number].kind == SPACE && !same(work, number))
            return 0;
    return 1;
}

/* The arguments of `cloudfs_tower_read`, packed. */
struct request { const struct floor *floors; u64 count, address, size; u8 *out; };

/* Fill `out` with `size` bytes from `address` of the uppermost floor on, and look afterwards whether all that stands
 * on one another is what it was: the uppermost first, since what is said of it was read through those below. */
PUBLIC int cloudfs_tower_read(const struct request *of)
{
    struct work work;
    if (!begun(&work, of->floors, of->count, of->size > TABLE_BYTES))
        return 0;
    return fetch(&work, 0, of->address, of->out, of->size) && all_same(&work);
}

/* The arguments of `cloudfs_tower_gather`, packed. */
struct rows { const struct floor *floors; u64 count; const u64 *addresses; u64 rows, width; u8 *out; };

/* The same of `rows` rows of `width` bytes, each at an address of its own: all of them, or 0. */
PUBLIC int cloudfs_tower_gather(const struct rows *of)
{
    struct work work;
    if (!begun(&work, of->floors, of->count, 0))
        return 0;
    for (u64 row = 0; row < of->rows; row++)
        if (!fetch(&work, 0, of->addresses[row], of->out + row * of->width, of->width))
            return 0;
    return all_same(&work);
}

PUBLIC u64 cloudfs_tower_floor_size(void) { return sizeof(struct floor); }
