/* Memory of another process in one call: whether its pages are there, the copy, whether it still was that process.
 *
 * Knows nothing of Python, and decides nothing: what is not the usual case is left to whoever asked, who does the same
 * by single system calls.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdint.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#define PUBLIC __attribute__((visibility("default")))
#ifndef SYS_pidfd_send_signal
#define SYS_pidfd_send_signal 424 /* Linux 5.1; the same on all machines but alpha */
#endif

typedef uint64_t u64;

/* struct pm_scan_arg and struct page_region, include/uapi/linux/fs.h of Linux 6.7 */
struct scan {
    u64 size, flags, start, stop, walk_end, vector, vector_length, most, inverted, all, any, returned;
};
struct region {
    u64 start, stop, categories;
};
#define SCAN _IOWR('f', 16, struct scan)

enum { ENTRIES = 512, NEAR = 8, SCANS = 1, SWAPPED_TOO = 2, BY_PID = 4 };
static const u64 PRESENT = UINT64_C(1) << 63, SWAPPED = UINT64_C(1) << 62;
static const u64 IS_PRESENT = 1 << 3, IS_SWAPPED = 1 << 4;
static const u64 SCAN_PAGES = 64; /* from so many on the ioctl is the faster way */

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

/* Whether the address space still is there that this pagemap is of. */
static int there(int pagemap)
{
    u64 entry;
    return pread(pagemap, &entry, sizeof entry, 0) == sizeof entry;
}

/* Fill `out` with `size` bytes from `address` on; 0, and anything in `out`, where that is not the usual case.
 *
 * `how` is made of SCANS (the ioctl works), SWAPPED_TOO (a page in swap may be read), BY_PID (process_vm_readv, and a
 * look afterwards at whom the PID means). `shift` is that of a page. */
PUBLIC int cloudfs_read_held(int mem, int pagemap, int pidfd, int pid, u64 address, void *out, u64 size, unsigned shift,
                             int how)
{
    struct iovec here = {out, size}, there_ = {(void *)(uintptr_t)address, size};
    u64 first = address >> shift, last = (address + size - 1) >> shift;
    if (!size || address + size - 1 < address || !held(pagemap, first, last - first + 1, shift, how))
        return 0;
    if (!(how & BY_PID))
        return preadv(mem, &here, 1, (off_t)address) == (ssize_t)size;
    return syscall(SYS_process_vm_readv, pid, &here, 1, &there_, 1, 0) == (long)size && there(pagemap) &&
           (syscall(SYS_pidfd_send_signal, pidfd, 0, NULL, 0) == 0 || errno == EPERM);
}

/* How many of its pages each of `count` rows of `width` bytes has, in memory or in swap, into `found`.
 *
 * Entries are read for each row alone, until rows that ascend lie near one another: then ever more at a time. */
PUBLIC void cloudfs_held_pages(int pagemap, const u64 *addresses, u64 count, u64 width, unsigned shift, u64 *found)
{
    u64 entries[ENTRIES], begin = 0, have = 0, ahead = 0;
    for (u64 row = 0; row < count; row++) {
        u64 first = addresses[row] >> shift, last = (addresses[row] + width - 1) >> shift, number = 0;
        if (last < first)
            last = first; /* over 2^64: it faults in its first page or behind */
        for (u64 page = first; page <= last; page++) {
            if (page < begin || page - begin >= have) {
                u64 wanted = last - page + 1;
                ssize_t size;
                ahead = have && page >= begin && page - begin < have + NEAR ? 2 * ahead + NEAR : 0;
                wanted = wanted + ahead < ENTRIES ? wanted + ahead : ENTRIES;
                size = pread(pagemap, entries, wanted * sizeof *entries, (off_t)(page * sizeof *entries));
                begin = page;
                have = size < 0 ? 0 : (u64)size / sizeof *entries;
                if (!have) {
                    have = 1;
                    entries[0] = 0;
                }
            }
            number += !!(entries[page - begin] & (PRESENT | SWAPPED));
        }
        found[row] = number;
    }
}
