/* All that the guest knows of itself, left in its memory for the host to fetch.
 *
 * A serial port of an emulated machine moves some 20 KB a second. So the truth is collected in memory, and the console
 * tells only the page frames of an index of page frames; the host takes the pages from the guest's RAM and says so;
 * then they are wiped. A section is a line "NAME LENGTH", LENGTH bytes and a line feed.
 */
#include "guest.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/klog.h>
#include <sys/mman.h>
#include <unistd.h>

#define MOST (64UL * 1024 * 1024)

static char *box;
static size_t used;
static size_t page_size;

static const char *const of_system[] = {
    "/proc/version", "/proc/cmdline", "/proc/uptime", "/proc/loadavg", "/proc/stat", "/proc/iomem", "/proc/cpuinfo",
    "/proc/meminfo", "/proc/buddyinfo", "/proc/zoneinfo", "/proc/slabinfo", "/proc/vmallocinfo", "/proc/modules",
    "/proc/mounts", "/proc/filesystems", "/proc/devices", "/proc/cgroups", "/proc/locks", "/proc/kallsyms",
    "/proc/sys/kernel/hostname", "/proc/sys/kernel/osrelease", "/proc/sys/kernel/version", "/proc/sys/kernel/random/boot_id",
    "/proc/net/tcp", "/proc/net/tcp6", "/proc/net/udp", "/proc/net/udp6", "/proc/net/unix", "/proc/net/netlink",
    "/proc/net/packet", "/proc/net/dev", "/proc/net/route", "/sys/kernel/vmcoreinfo", "/tmp/secrets",
};
static const char *const of_process[] = {
    "stat", "status", "statm", "cmdline", "environ", "maps", "comm", "cgroup", "mountinfo", "auxv", "limits", "wchan",
    "stack", "uid_map", "oom_score_adj", "sched",
};
static const char *const links_of_process[] = {
    "exe", "cwd", "root", "ns/pid", "ns/mnt", "ns/net", "ns/uts", "ns/ipc", "ns/user", "ns/cgroup",
};
static const char *const of_thread[] = {"stat", "status", "comm", "stack"};

static void need(size_t size)
{
    if (size > MOST - used) {
        say("failed truth: more than %lu bytes", MOST);
        _exit(1);
    }
}

static void add(const char *format, ...)
{
    va_list values;
    need(8192);
    va_start(values, format);
    used += vsnprintf(box + used, 8192, format, values);
    va_end(values);
}

/* A section of unknown length: its header has room for the number, which close_section fills in. */
static size_t open_section(const char *name)
{
    add("%s ", name);
    size_t at = used;
    add("%010d\n", 0);
    return at;
}

static void close_section(size_t at)
{
    char length[16];
    snprintf(length, sizeof length, "%010zu", used - at - 11);
    memcpy(box + at, length, 10);
    add("\n");
}

static void add_file(const char *path)
{
    int descriptor = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (descriptor < 0)
        return;
    size_t at = open_section(path);
    for (;;) {
        need(65536);
        ssize_t length = read(descriptor, box + used, 65536);
        if (length < 0 && errno == EINTR)
            continue;
        if (length <= 0)
            break;
        used += length;
    }
    close_section(at);
    close(descriptor);
}

static void add_link(const char *path)
{
    char target[4096];
    ssize_t length = readlink(path, target, sizeof target);
    if (length < 0)
        return;
    size_t at = open_section(path);
    need(length);
    memcpy(box + used, target, length);
    used += length;
    close_section(at);
}

/* One line for each descriptor: its number, then where it leads to. */
static void add_descriptors(const char *process)
{
    char path[300], target[4096];
    struct dirent *entry;
    snprintf(path, sizeof path, "%s/fd", process);
    DIR *folder = opendir(path);
    if (!folder)
        return;
    size_t at = open_section(path);
    while ((entry = readdir(folder)) != NULL) {
        snprintf(path, sizeof path, "%s/fd/%s", process, entry->d_name);
        ssize_t length = readlink(path, target, sizeof target - 1);
        if (length >= 0) {
            target[length] = '\0';
            add("%s %s\n", entry->d_name, target);
        }
    }
    close_section(at);
    closedir(folder);
}

/* pagemap in runs: address, pages, first frame, bits 55 to 63. Neighbouring frames with the same bits make one line. */
static void add_pagemap(const char *process)
{
    static uint64_t entries[4096];
    static char line[8192];
    char path[300];
    snprintf(path, sizeof path, "%s/maps", process);
    FILE *maps = fopen(path, "re");
    snprintf(path, sizeof path, "%s/pagemap", process);
    int pagemap = open(path, O_RDONLY | O_CLOEXEC);
    if (!maps || pagemap < 0)
        return;
    size_t at = open_section(path);
    while (fgets(line, sizeof line, maps)) {
        unsigned long long start, stop, run = 0, count = 0, first = 0;
        if (sscanf(line, "%llx-%llx", &start, &stop) != 2 || strstr(line, "[vsyscall]"))
            continue;
        for (unsigned long long from = start; from < stop;) {
            size_t wanted = (stop - from) / page_size < 4096 ? (stop - from) / page_size : 4096;
            ssize_t length = pread64(pagemap, entries, wanted * 8, from / page_size * 8);
            if (length < 8)
                break;
            for (ssize_t i = 0; i < length / 8; i++, from += page_size) {
                uint64_t follows = first + ((first & PAGEMAP_PRESENT) ? count : 0);
                if (count && entries[i] == follows) {
                    count++;
                    continue;
                }
                if (count && first)
                    add("%llx %llu %llx %llx\n", run, count, first & PAGEMAP_FRAME, first >> 55);
                run = from;
                first = entries[i];
                count = 1;
            }
        }
        if (count && first)
            add("%llx %llu %llx %llx\n", run, count, first & PAGEMAP_FRAME, first >> 55);
    }
    close_section(at);
    fclose(maps);
    close(pagemap);
}

static void add_threads(const char *process)
{
    char path[600];
    struct dirent *entry;
    snprintf(path, sizeof path, "%s/task", process);
    DIR *folder = opendir(path);
    while (folder && (entry = readdir(folder)) != NULL) {
        if (entry->d_name[0] == '.')
            continue;
        for (size_t i = 0; i < sizeof of_thread / sizeof *of_thread; i++) {
            snprintf(path, sizeof path, "%s/task/%s/%s", process, entry->d_name, of_thread[i]);
            add_file(path);
        }
    }
    if (folder)
        closedir(folder);
}

static void add_processes(void)
{
    char process[300], path[400];
    struct dirent *entry;
    DIR *folder = opendir("/proc");
    while (folder && (entry = readdir(folder)) != NULL) {
        if (entry->d_name[0] < '0' || entry->d_name[0] > '9' || atoi(entry->d_name) == getpid())
            continue;
        snprintf(process, sizeof process, "/proc/%s", entry->d_name);
        for (size_t i = 0; i < sizeof of_process / sizeof *of_process; i++) {
            snprintf(path, sizeof path, "%s/%s", process, of_process[i]);
            add_file(path);
        }
        for (size_t i = 0; i < sizeof links_of_process / sizeof *links_of_process; i++) {
            snprintf(path, sizeof path, "%s/%s", process, links_of_process[i]);
            add_link(path);
        }
        add_descriptors(process);
        add_pagemap(process);
        add_threads(process);
    }
    if (folder)
        closedir(folder);
}

static void add_kernel_log(void)
{
    size_t at = open_section("dmesg");
    int size = klogctl(10, NULL, 0);             /* SYSLOG_ACTION_SIZE_BUFFER */
    need(size > 0 ? size : 0);
    int length = klogctl(3, box + used, size);   /* SYSLOG_ACTION_READ_ALL */
    used += length > 0 ? length : 0;
    close_section(at);
}

/* The CRC-32 of zlib. */
static uint32_t sum_of(const char *bytes, size_t length, uint32_t sum)
{
    static uint32_t table[256];
    for (uint32_t i = 0; table[255] == 0 && i < 256; i++) {
        table[i] = i;
        for (int bit = 0; bit < 8; bit++)
            table[i] = table[i] >> 1 ^ (table[i] & 1 ? 0xedb88320U : 0);
    }
    for (sum = ~sum; length--; bytes++)
        sum = sum >> 8 ^ table[(sum ^ (unsigned char)*bytes) & 255];
    return ~sum;
}

/* The type information is large: the host needs to know only whether it found the same. */
static void add_types(void)
{
    static char bytes[65536];
    int descriptor = open("/sys/kernel/btf/vmlinux", O_RDONLY | O_CLOEXEC);
    unsigned long long total = 0;
    uint32_t sum = 0;
    ssize_t length;
    if (descriptor < 0)
        return;
    while ((length = read(descriptor, bytes, sizeof bytes)) > 0) {
        sum = sum_of(bytes, length, sum);
        total += length;
    }
    size_t at = open_section("btf");
    add("size %llu\ncrc32 %08x\n", total, sum);
    close_section(at);
    close(descriptor);
}

uint64_t page_frame(int pagemap, uintptr_t address)
{
    uint64_t entry = 0;
    off64_t at = (off64_t)(address / page_size) * 8;
    if (pread64(pagemap, &entry, 8, at) != 8 || !(entry & PAGEMAP_PRESENT))
        die("pagemap");
    return entry & PAGEMAP_FRAME;
}

/* "truth LENGTH CRC32 PAGE_SIZE" and the frames of the pages of an index of frames. */
static void hand_over(void)
{
    char line[4000];
    int pagemap = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
    size_t pages = (used + page_size - 1) / page_size, size = pages * 8;
    uint64_t *frames = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (pagemap < 0 || frames == MAP_FAILED)
        die("truth");
    for (size_t i = 0; i < pages; i++)
        frames[i] = page_frame(pagemap, (uintptr_t)box + i * page_size);
    int length = snprintf(line, sizeof line, "truth %zu %08x %zu", used, sum_of(box, used, 0), page_size);
    for (size_t at = 0; at < size; at += page_size)
        length += snprintf(line + length, sizeof line - length, " %llx",
                           (unsigned long long)page_frame(pagemap, (uintptr_t)frames + at));
    say("%s", line);
    hear(line, sizeof line);
    memset(frames, 0, size);
}

void tell_truth(void)
{
    page_size = sysconf(_SC_PAGESIZE);
    box = mmap(NULL, MOST, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (box == MAP_FAILED)
        die("truth");
    for (size_t i = 0; i < sizeof of_system / sizeof *of_system; i++)
        add_file(of_system[i]);
    add_kernel_log();
    add_types();
    add_processes();
    hand_over();
    memset(box, 0, used);
}
