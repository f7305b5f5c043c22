/* What numpy is too slow for: gathering rows from mappings, and walking page tables by the rows of a mode.
 *
 * Knows nothing of Python: plain columns in, plain columns out. Every mapping may be one of a file that somebody cuts
 * at this very moment: reading it is SIGBUS then, which the guard below turns into a row that failed.
 */
#define _GNU_SOURCE
#include <setjmp.h>
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "modes.h"

/* -- the guard ------------------------------------------------------------------------------------------------- */

static __thread sigjmp_buf *guard;
static __thread int chaining;
static struct sigaction before;

static void on_bus_error(int number, siginfo_t *info, void *context)
{
    sigjmp_buf *to = guard;
    if (to && info->si_code > 0) { /* made by the kernel for this very thread, not sent by kill(2) */
        guard = NULL;
        siglongjmp(*to, 1);
    }
    if (!chaining && (before.sa_flags & SA_SIGINFO) && before.sa_sigaction) {
        chaining = 1;
        before.sa_sigaction(number, info, context);
        chaining = 0;
        return;
    }
    if (!chaining && !(before.sa_flags & SA_SIGINFO) && before.sa_handler != SIG_DFL && before.sa_handler != SIG_IGN) {
        chaining = 1;
        before.sa_handler(number);
        chaining = 0;
        return;
    }
    if (before.sa_handler == SIG_IGN && info->si_code <= 0)
        return;
    signal(SIGBUS, SIG_DFL);
    raise(SIGBUS);
}

/* Whoever set a handler after ours (Python's faulthandler does) is asked by ours from now on. */
static void watch(void)
{
    struct sigaction now, ours;
    if (!sigaction(SIGBUS, NULL, &now) && (now.sa_flags & SA_SIGINFO) && now.sa_sigaction == on_bus_error)
        return;
    memset(&ours, 0, sizeof ours);
    ours.sa_sigaction = on_bus_error;
    ours.sa_flags = SA_SIGINFO | SA_NODEFER | SA_ONSTACK;
    sigemptyset(&ours.sa_mask);
    before = now;
    sigaction(SIGBUS, &ours, NULL);
}

/* -- memory ---------------------------------------------------------------------------------------------------- */

struct piece {
    u64 address, size;
    const u8 *bytes;
};

struct memory {
    const struct piece *pieces;
    u64 count, last;
};

/* The `width` bytes at `address` where they lie in one piece, else NULL. */
INLINE const u8 *place(struct memory *memory, u64 address, u64 width)
{
    const struct piece *piece = memory->pieces + memory->last;
    u64 low = 0, high = memory->count;
    if (likely(address - piece->address < piece->size && width <= piece->size - (address - piece->address)))
        return piece->bytes + (address - piece->address);
    if (high == 1)
        return NULL;
    while (high - low > 1) {
        u64 middle = (low + high) / 2;
        if (memory->pieces[middle].address <= address)
            low = middle;
        else
            high = middle;
    }
    piece = memory->pieces + low;
    if (address - piece->address >= piece->size || width > piece->size - (address - piece->address))
        return NULL;
    memory->last = low;
    return piece->bytes + (address - piece->address);
}

INLINE u64 load(const u8 *bytes, unsigned size)
{
    switch (size) {
    case 8: return *(const volatile loose64 *)bytes;
    case 4: return *(const volatile loose32 *)bytes;
    case 2: return *(const volatile loose16 *)bytes;
    default: return *(const volatile u8 *)bytes;
    }
}

/* An entry anywhere: across pieces, or in a page that is gone. 0: it cannot be read. */
static __attribute__((noinline)) int slow_entry(struct memory *memory, u64 address, unsigned size, u64 *entry)
{
    sigjmp_buf here, *outer = guard;
    volatile u64 found = 0;
    if (sigsetjmp(here, 0)) {
        guard = outer;
        return 0;
    }
    guard = &here;
    for (unsigned byte = 0; byte < size; byte++) {
        const u8 *at = address + byte < address ? NULL : place(memory, address + byte, 1);
        if (!at) {
            guard = outer;
            return 0;
        }
        found |= load(at, 1) << (8 * byte);
    }
    guard = outer;
    *entry = found;
    return 1;
}

#define WIDE 1024
#define AHEAD 8

INLINE void copy_rows(struct memory *memory, const u64 *addresses, u64 count, u64 width, u8 *out,
                      volatile u64 *current, u64 *failed, volatile u64 *failures)
{
    for (u64 row = *current; row < count; row++) {
        const u8 *from = place(memory, addresses[row], width);
        *current = row;
        settled();
        if (width >= WIDE && row + 1 < count) { /* the next row comes nearer while this one is copied */
            const u8 *next = place(memory, addresses[row + 1], width);
            for (unsigned line = 0; next && line < AHEAD; line++)
                __builtin_prefetch(next + 64 * line);
        }
        if (unlikely(!from)) {
            failed[*failures] = row;
            ++*failures;
            continue;
        }
        memcpy(out + row * width, from, width);
    }
}

/* Row i of `out` is the `width` bytes at addresses[i]; gives how many rows could not be read, their numbers ascending
 * in `failed`. What `out` holds of those is unspecified. */
PUBLIC u64 cloudfs_gather(const struct piece *pieces, u64 piece_count, const u64 *addresses, u64 count, u64 width,
                          u8 *out, u64 *failed)
{
    struct memory memory = {pieces, piece_count, 0};
    volatile u64 current = 0, failures = 0;
    sigjmp_buf here;
    watch();
    if (sigsetjmp(here, 0)) {
        u64 number = failures;
        memory.last = 0;
        if (!number || failed[number - 1] != current) {
            failed[number] = current;
            failures = number + 1;
        }
        ++current;
    }
    guard = &here;
    switch (width) {
    case 8: copy_rows(&memory, addresses, count, 8, out, &current, failed, &failures); break;
    case 4: copy_rows(&memory, addresses, count, 4, out, &current, failed, &failures); break;
    default: copy_rows(&memory, addresses, count, width, out, &current, failed, &failures);
    }
    guard = NULL;
    return failures;
}

/* -- many addresses ---------------------------------------------------------------------------------------------- */

#define KEPT 512
#define KEPT_LEAST 128

struct kept { u64 key, table; u8 rights; };
struct answers { u64 *physical; u8 *page_bits, *kinds, *rights, *flags; };

INLINE void absent(const struct answers *out, u64 row, u8 kind)
{
    out->physical[row] = 0;
    out->page_bits[row] = 0;
    out->kinds[row] = kind;
    if (out->rights)
        out->rights[row] = out->flags[row] = 0;
}

/* Gives 1 where the mode does not translate the address, else 0. */
INLINE u64 walk_one(struct memory *memory, const struct mode *mode, unsigned size, u64 table, u64 address, u64 row,
                     const struct answers *out, int ask, struct kept *kept, int slow)
{
    u64 last = mode->levels - 1, number = 0, entry;
    u8 rights = 0xFF;
    struct kept *known = NULL;
    if (!canonical(mode, &address)) {
        absent(out, row, OTHER);
        return 1;
    }
    if (kept) {
        u64 key = address >> mode->level[last - 1].shift;
        known = kept + (key & (KEPT - 1));
        if (known->key == key + 1) {
            number = last;
            table = known->table;
            rights = known->rights;
        }
    }
    for (;; number++) {
        const struct level *level = mode->level + number;
        u64 at = table + (address >> level->shift & level->index_mask) * size;
        const u8 *bytes = place(memory, at, size);
        const struct kind *kind;
        if (likely(bytes && !slow)) {
            entry = load(bytes, size);
        } else if (!slow_entry(memory, at, size, &entry)) {
            absent(out, row, TABLE);
            return 0;
        }
        kind = entry ? kind_of(mode, level, entry) : NULL;
        if (unlikely(!kind || kind->fault)) {
            u8 why = kind ? (u8)kind->fault : ABSENT;
            absent(out, row, why);
            if (ask && entry && why == ABSENT) {
                out->physical[row] = entry;
                out->page_bits[row] = (u8)number;
                out->kinds[row] = ASK;
            }
            return 0;
        }
        if (out->rights)
            rights &= rights_of(kind, entry);
        table = base_of(kind, entry);
        if (!kind->is_table) {
            out->physical[row] = (table & ~kind->inside) | (address & kind->inside);
            out->page_bits[row] = (u8)kind->page_bits;
            out->kinds[row] = 0;
            if (out->rights) {
                out->rights[row] = rights;
                out->flags[row] = ruled(kind->flag, kind->flags, entry);
            }
            return 0;
        }
        if (known && number + 1 == last) {
            known->key = (address >> mode->level[last - 1].shift) + 1;
            known->table = table;
            known->rights = rights;
            settled();
        }
    }
}

static __attribute__((noinline)) void walk_slowly(struct memory *memory, const struct mode *mode, u64 table,
                                                  u64 address, u64 row, const struct answers *out, int ask)
{
    walk_one(memory, mode, (unsigned)mode->entry_size, table, address, row, out, ask, NULL, 1);
}

INLINE void walk_rows(struct memory *memory, const struct mode *mode, unsigned size, u64 table, const u64 *addresses,
                      u64 count, const struct answers *out, int ask, struct kept *kept, volatile u64 *current,
                      volatile u64 *others)
{
    for (u64 row = *current; row < count; row++) {
        *current = row;
        settled();
        if (unlikely(walk_one(memory, mode, size, table, addresses[row], row, out, ask, kept, 0)))
            ++*others;
    }
}

INLINE void walk_all(struct memory *memory, const struct mode *mode, u64 table, const u64 *addresses, u64 count,
                     const struct answers *out, int ask, struct kept *kept, volatile u64 *current,
                     volatile u64 *others)
{
    switch (mode->entry_size) {
    case 8: walk_rows(memory, mode, 8, table, addresses, count, out, ask, kept, current, others); break;
    case 4: walk_rows(memory, mode, 4, table, addresses, count, out, ask, kept, current, others); break;
    default: walk_rows(memory, mode, (unsigned)mode->entry_size, table, addresses, count, out, ask, kept, current,
                       others);
    }
}

/* Where each address lies; `rights` and `flags` may be NULL. Gives how many this mode does not translate (OTHER). */
PUBLIC u64 cloudfs_translate(const struct piece *pieces, u64 piece_count, const struct mode *mode, u64 table,
                              const u64 *addresses, u64 count, u64 *physical, u8 *page_bits, u8 *kinds, u8 *rights,
                              u8 *flags, int ask)
{
    struct memory memory = {pieces, piece_count, 0};
    const struct answers plain = {physical, page_bits, kinds, NULL, NULL};
    const struct answers full = {physical, page_bits, kinds, rights, flags};
    struct kept kept[KEPT];
    int keep = count >= KEPT_LEAST && mode->levels > 1;
    volatile u64 current = 0, others = 0;
    sigjmp_buf here;
    watch();
    if (keep)
        for (int slot = 0; slot < KEPT; slot++)
            kept[slot].key = 0;
    if (sigsetjmp(here, 0)) {
        memory.last = 0;
        walk_slowly(&memory, mode, table, addresses[current], current, rights ? &full : &plain, ask);
        ++current;
    }
    guard = &here;
    if (rights)
        walk_all(&memory, mode, table, addresses, count, &full, ask, keep ? kept : NULL, &current, &others);
    else
        walk_all(&memory, mode, table, addresses, count, &plain, ask, keep ? kept : NULL, &current, &others);
    guard = NULL;
    return others;
}

/* -- a whole tree -------------------------------------------------------------------------------------------------- */

#define LEVELS 8
#define UNREADABLE 100
#define REPEATS 64

struct met { u64 table, level, count; };
struct frame {
    u64 table, start, index, end, rights;
    const u8 *bytes; /* of the whole table; NULL: each entry is looked for */
    u64 told;        /* that it cannot be read */
};
struct tree {
    u64 depth, done; /* the frame at work; whether all is done */
    u64 low, last;
    u64 left, remembered, used, slots; /* tables that may still be read; of how many the visits are counted */
    u64 tables, repeated, malformed, limited, unreadables;
    u64 rows;        /* written so far, at the last moment that all of this agreed */
    struct met *met; /* `slots` of them, a power of two, at least twice `remembered`; `count` 0: free */
    u64 unreadable[UNREADABLE];
    struct frame frame[LEVELS];
};
struct columns { u64 *starts, *sizes, *physical; u8 *page_bits, *rights, *flags, *kinds; };

static void enter(struct tree *tree, struct memory *memory, const struct mode *mode, u64 depth, u64 table, u64 start,
                  u64 rights)
{
    struct frame *frame = tree->frame + depth;
    const struct level *level = mode->level + depth;
    u64 count = level->index_mask + 1;
    frame->table = table;
    frame->start = start;
    frame->rights = rights;
    frame->told = 0;
    frame->index = tree->low > start ? (tree->low - start) >> level->shift : 0;
    frame->end = ((tree->last - start) >> level->shift) + 1;
    if (frame->end > count)
        frame->end = count;
    frame->bytes = place(memory, table, count * mode->entry_size);
    tree->tables++;
    tree->depth = depth;
}

/* Whether the walk may go into this table once more. */
static int admitted(struct tree *tree, u64 level, u64 table)
{
    u64 slot = (table >> 5 ^ table >> 12 ^ level << 7) * 0x9E3779B97F4A7C15u >> 20 & (tree->slots - 1);
    struct met *met;
    for (;; slot = (slot + 1) & (tree->slots - 1)) {
        met = tree->met + slot;
        if (!met->count || (met->table == table && met->level == level))
            break;
    }
    if (met->count >= REPEATS) {
        tree->repeated++;
        return 0;
    }
    if (!tree->left) {
        tree->limited = 1;
        return 0;
    }
    tree->left--;
    if (met->count || tree->used < tree->remembered) {
        tree->used += !met->count;
        met->table = table;
        met->level = level;
        met->count++;
    }
    return 1;
}

static void tell_unreadable(struct tree *tree, struct frame *frame)
{
    if (frame->told)
        return;
    frame->told = 1;
    for (u64 number = 0; number < tree->unreadables; number++)
        if (tree->unreadable[number] == frame->table)
            return;
    if (tree->unreadables < UNREADABLE)
        tree->unreadable[tree->unreadables++] = frame->table;
}

INLINE void emit(const struct columns *out, u64 row, u64 start, u64 size, u64 physical, u64 page_bits, u8 rights,
                 u8 flags, u8 kind)
{
    out->starts[row] = start;
    out->sizes[row] = size;
    out->physical[row] = physical;
    out->page_bits[row] = (u8)page_bits;
    out->rights[row] = rights;
    out->flags[row] = flags;
    out->kinds[row] = kind;
}

/* Walk on until all is done or the columns are full; what is below here reads the state of `tree` alone. */
INLINE void walk_tree(struct tree *tree, struct memory *memory, const struct mode *mode, unsigned size,
                      const struct columns *out, u64 capacity, int ask)
{
    u64 rows = tree->rows;
    while (!tree->done) {
        struct frame *frame = tree->frame + tree->depth;
        const struct level *level = mode->level + tree->depth;
        const u8 *bytes = frame->bytes;
        u64 index = frame->index, end = frame->end, malformed = 0, child = 0, child_rights = 0;
        u64 tested = 0;
        u8 rights = 0, flags = 0;
        const struct kind *kind = NULL;
        int down = 0;
        for (; index < end && rows < capacity && !down; index++) {
            u64 entry, start, span = (u64)1 << level->shift;
            if (likely(bytes != NULL)) {
                entry = load(bytes + index * size, size);
                if (!entry)
                    continue;
            } else if (!slow_entry(memory, frame->table + index * size, size, &entry)) {
                tell_unreadable(tree, frame);
                emit(out, rows++, frame->start + (index << level->shift), span, 0, 0, 0, 0, TABLE);
                continue;
            } else if (!entry)
                continue;
            start = frame->start + (index << level->shift);
            if (!kind || (entry & level->tested) != tested) { /* else it is what the entry before was */
                tested = entry & level->tested;
                kind = kind_of(mode, level, entry);
                if (kind) {
                    rights = (u8)(rights_of(kind, entry) & frame->rights);
                    flags = ruled(kind->flag, kind->flags, entry);
                }
            }
            if (likely(kind && !kind->fault && !kind->is_table)) {
                u64 base = base_of(kind, entry);
                emit(out, rows++, start, span, (base & ~kind->inside) | (start & kind->inside), kind->page_bits,
                     rights, flags, 0);
            } else if (kind && !kind->fault) {
                child = base_of(kind, entry);
                child_rights = rights;
                if (admitted(tree, tree->depth + 1, child))
                    down = 1;
                else
                    emit(out, rows++, start, span, 0, 0, 0, 0, NOT_WALKED);
            } else {
                u8 why = kind ? (u8)kind->fault : ABSENT;
                malformed += why == MALFORMED;
                if (why != ABSENT)
                    emit(out, rows++, start, span, 0, 0, 0, 0, why);
                else if (ask)
                    emit(out, rows++, start, span, entry, tree->depth, 0, 0, ASK);
            }
        }
        frame->index = index;
        tree->rows = rows;
        tree->malformed += malformed;
        settled();
        if (down)
            enter(tree, memory, mode, tree->depth + 1, child, frame->start + ((index - 1) << level->shift),
                  child_rights);
        else if (index < end)
            return;
        else if (!tree->depth)
            tree->done = 1;
        else
            tree->depth--;
        settled();
    }
}

/* Begin at a table of the top level, whose first entry begins at `start`; what lies in [low, last] is listed. */
PUBLIC void cloudfs_tree_begin(const struct piece *pieces, u64 piece_count, const struct mode *mode, struct tree *tree,
                               u64 table, u64 start, u64 low, u64 last)
{
    struct memory memory = {pieces, piece_count, 0};
    tree->low = low;
    tree->last = last;
    tree->done = 0;
    enter(tree, &memory, mode, 0, table, start, 0xFF);
}

/* Fill the columns from their start on; gives how many rows there are. `tree->done`: these were the last. */
PUBLIC u64 cloudfs_tree_walk(const struct piece *pieces, u64 piece_count, const struct mode *mode, struct tree *tree,
                             u64 capacity, u64 *starts, u8 *small, int ask)
{
    struct memory memory = {pieces, piece_count, 0};
    const struct columns out = {starts, starts + capacity, starts + 2 * capacity,
                                small, small + capacity, small + 2 * capacity, small + 3 * capacity};
    sigjmp_buf here;
    tree->rows = 0;
    watch();
    if (sigsetjmp(here, 0)) {
        /* A page of the table at work is gone: its entries one by one, from where all agreed. */
        memory.last = 0;
        tree->frame[tree->depth].bytes = NULL;
    }
    guard = &here;
    if (mode->entry_size == 8)
        walk_tree(tree, &memory, mode, 8, &out, capacity, ask);
    else
        walk_tree(tree, &memory, mode, (unsigned)mode->entry_size, &out, capacity, ask);
    guard = NULL;
    return tree->rows;
}

PUBLIC u64 cloudfs_tree_size(void) { return sizeof(struct tree); }
PUBLIC u64 cloudfs_mode_size(u64 kinds) { return sizeof(struct mode) + kinds * sizeof(struct kind); }
