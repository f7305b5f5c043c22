/* Memory of another process in one call: whether its pages are there, the copy, whether it still was that process.
 *
 * Knows nothing of Python, and decides nothing: what is not the usual case is left to whoever asked, who does the same
 * by single system calls.
 */
#define _GNU_SOURCE
#include <poll.h>
#include <stdint.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#define PUBLIC __attribute__((visibility("default")))

typedef uint64_t u64;

/* struct pm_scan_arg and struct page_region, include/uapi/linux/fs.h of Linux 6.7 */
struct scan {
    u64 size, flags, start, stop, walk_end, vector, vector_length, most, inverted, all, any, returned;
};
struct region {
    u64 start, stop, categories;
};
#define SCAN _IOWR('f', 16, struct scan)

enum { ENTRIES = 512, REGIONS = 64, NEAR = 48, HUGE = 512, FAR = 1 << 18 };
enum { SCANS = 1, SWAPPED_TOO = 2, BY_PID = 4 };
static const u64 PRESENT = UINT64_C(1) << 63, SWAPPED = UINT64_C(1) << 62;
static const u64 IS_PRESENT = 1 << 3, IS_SWAPPED = 1 << 4, IS_HUGE = 1 << 6;
static const u64 SCAN_PAGES = 8; /* from so many on the ioctl is the faster way */

static int scanned(int pagemap, u64 start, u64 stop, u64 categories)
{
    struct region found;
    struct scan scan = {sizeof scan, 0, start, stop, 0, (u64)(uintptr_t)&found, 1, 0, 0, 0, categories, 0};
    return ioctl(pagemap, SCAN, &scan) == 1 && found.start == start && found.stop == stop;
}

/* Whether each of `count` pages is in memory, or in swap where that counts. */
static int held(int pagemap, u64 first, u64 count, unsigned shift, int how)
{
    u64 entries[ENTRIES], wanted = PRESENT | (how & SWAPPED_TOO ? SWAPPED : 0);
    if (count >= SCAN_PAGES && how & SCANS)
        return scanned(pagemap, first << shift, (first + count) << shift,
                       IS_PRESENT | (how & SWAPPED_TOO ? IS_SWAPPED : 0));
    while (count) {
        u64 part = count < ENTRIES ? count : ENTRIES;
        ssize_t size = (ssize_t)(part * sizeof *entries);
        if (pread(pagemap, entries, (size_t)size, (off_t)(first * sizeof *entries)) != size)
            return 0;
        for (u64 i = 0; i < part; i++)
            if (!(entries[i] & wanted))
                return 0;
        first += part;
        count -= part;
    }
    return 1;
}

/* Whether the address space still is there that this pagemap is of: a scan of nothing is half a look at an entry. */
static int there(int pagemap, int how)
{
    struct scan scan = {.size = sizeof scan, .any = IS_PRESENT};
    u64 entry;
    if (how & SCANS)
        return ioctl(pagemap, SCAN, &scan) == 0;
    return pread(pagemap, &entry, sizeof entry, 0) == sizeof entry;
}

/* Whether a process has not ended: its PID is nobody else's then. */
static int lives(int pidfd)
{
    struct pollfd watched = {pidfd, POLLIN, 0};
    return poll(&watched, 1, 0) == 0;
}

/* The arguments of `cloudfs_read_held`, packed. */
struct request {
    u64 address, size;
    void *out;
    int32_t mem, pagemap, pidfd, pid, shift, how;
};

/* Fill `out` with `size` bytes from `address` on; 0, and anything in `out`, where that is not the usual case.
 *
 * `how` is made of SCANS (the ioctl works), SWAPPED_TOO (a page in swap may be read), BY_PID (process_vm_readv, and a
 * look afterwards at whom the PID means). `shift` is that of a page. */
PUBLIC int cloudfs_read_held(const struct request *of)
{
    struct iovec here = {of->out, of->size}, remote = {(void *)(uintptr_t)of->address, of->size};
    u64 first = of->address >> of->shift, last = (of->address + of->size - 1) >> of->shift;
    if (!of->size || last < first || !held(of->pagemap, first, last - first + 1, (unsigned)of->shift, of->how))
        return 0;
    if (!(of->how & BY_PID))
        return pread(of->mem, of->out, of->size, (off_t)of->address) == (ssize_t)of->size;
    return syscall(SYS_process_vm_readv, of->pid, &here, 1, &remote, 1, 0) == (long)of->size &&
           there(of->pagemap, of->how) && lives(of->pidfd);
}

/* -- which pages of many rows are held ------------------------------------------------------------------------- */

/* Pages from `begin` to `end` of which it is known: by their entries, or by the regions in which they are held. */
struct window {
    u64 begin, end, ahead;
    u64 count, at; /* regions, and the one that was looked at last: pages ascend, but for a few of a row before */
    union {
        u64 entries[ENTRIES];
        struct region regions[REGIONS];
    };
};

/* Look at pages from `page` on, at least up to `last` and at most up to `limit`. What of them cannot be known is not
 * held. Pages ahead are looked at where that is cheap: where rows lie near one another, or pages are huge. */
static void look(struct window *window, int pagemap, u64 page, u64 last, u64 limit, unsigned shift)
{
    u64 stop = last + 1 + (window->ahead < limit - last ? window->ahead : limit - last - 1), huge = 0;
    struct scan scan = {sizeof scan, 0, page << shift, stop << shift, 0, (u64)(uintptr_t)window->regions, REGIONS,
                        0, 0, 0, IS_PRESENT | IS_SWAPPED, IS_HUGE};
    int near = window->end && page >= window->begin && page < window->end + NEAR, found = ioctl(pagemap, SCAN, &scan);
    window->begin = page;
    window->at = 0;
    window->count = found < 0 ? 0 : (u64)found;
    window->end = found < 0 ? page + 1 : scan.walk_end >> shift;
    if (window->end <= page)
        window->end = page + 1;
    for (u64 index = 0; index < window->count; index++)
        if (window->regions[index].categories & IS_HUGE)
            huge += (window->regions[index].stop - window->regions[index].start) >> shift;
    if (2 * huge >= window->end - page)
        window->ahead = window->ahead < FAR / 2 ? 2 * window->ahead + HUGE : FAR;
    else
        window->ahead = !near ? 0 : window->ahead < ENTRIES / 2 ? 2 * window->ahead + NEAR : ENTRIES;
}

static int in_region(struct window *window, u64 address)
{
    while (window->at && window->regions[window->at].start > address)
        window->at--;
    while (window->at < window->count && window->regions[window->at].stop <= address)
        window->at++;
    return window->at < window->count && window->regions[window->at].start <= address;
}

/* The same by entries, before Linux 6.7. */
static void look_at_entries(struct window *window, int pagemap, u64 page, u64 last)
{
    u64 wanted = last - page + 1 + window->ahead;
    int near = window->end && page >= window->begin && page < window->end + NEAR;
    ssize_t size;
    wanted = wanted < ENTRIES ? wanted : ENTRIES;
    size = pread(pagemap, window->entries, wanted * sizeof *window->entries, (off_t)(page * sizeof *window->entries));
    window->begin = page;
    window->end = page + (size < 0 ? 0 : (u64)size / sizeof *window->entries);
    if (window->end == page) {
        window->end++;
        window->entries[0] = 0;
    }
    window->ahead = near ? 2 * window->ahead + NEAR : 0;
}

/* How many of its pages each of `count` rows of `width` bytes, which ascend, has in memory or in swap, into `found`. */
PUBLIC void cloudfs_held_pages(int pagemap, const u64 *addresses, u64 count, u64 width, unsigned shift, int how,
                               u64 *found)
{
    struct window window;
    u64 limit = count ? (addresses[count - 1] + width - 1) >> shift : 0;
    window.begin = window.end = window.ahead = window.count = window.at = 0;
    for (u64 row = 0; row < count; row++) {
        u64 first = addresses[row] >> shift, last = (addresses[row] + width - 1) >> shift, number = 0;
        if (last < first)
            last = first; /* over 2^64: it faults in its first page or behind */
        if (limit < last)
            limit = last;
        for (u64 page = first; page <= last; page++) {
            if (page < window.begin || page >= window.end) {
                if (how & SCANS)
                    look(&window, pagemap, page, last, limit + 1, shift);
                else
                    look_at_entries(&window, pagemap, page, last);
            }
            if (how & SCANS)
                number += (u64)in_region(&window, page << shift);
            else
                number += !!(window.entries[page - window.begin] & (PRESENT | SWAPPED));
        }
        found[row] = number;
    }
}
