/* /init of a guest whose memory holds all kinds of contents: pages in swap, files on a disk of which only a part is
 * cached, large folios, a program of 32 bits. What is where it writes to /tmp/secrets, which the truth takes along.
 */
#include "guest.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/loop.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/reboot.h>
#include <sys/stat.h>
#include <sys/swap.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#define MEBIBYTE (1024UL * 1024)
#define AREA (64 * MEBIBYTE)

static FILE *list;
static size_t page_size;

void die(const char *what)
{
    say("failed %s: %s", what, strerror(errno));
    if (getpid() == 1)
        reboot(RB_POWER_OFF);
    _exit(1);
}

static void mount_at(const char *device, const char *kind, const char *place, unsigned long flags, const char *options)
{
    mkdir(place, 0755);
    if (mount(device, place, kind, flags, options) < 0)
        say("note mount %s: %s", place, strerror(errno));
}

static void write_file(const char *path, const char *text)
{
    int descriptor = open(path, O_WRONLY);
    if (descriptor < 0 || write(descriptor, text, strlen(text)) < 0)
        say("note %s: %s", path, strerror(errno));
    close(descriptor);
}

static void load_modules(void)
{
    struct dirent **entries;
    int count = scandir("/lib/modules", &entries, NULL, alphasort);
    for (int i = 0; i < count; i++) {
        char path[300];
        if (entries[i]->d_name[0] == '.')
            continue;
        snprintf(path, sizeof path, "/lib/modules/%s", entries[i]->d_name);
        int descriptor = open(path, O_RDONLY | O_CLOEXEC);
        if (descriptor < 0 || syscall(SYS_finit_module, descriptor, "", 0) < 0)
            say("note %s: %s", entries[i]->d_name, strerror(errno));
        close(descriptor);
    }
}

/* A header as mkswap(8) writes it (include/linux/swap.h, union swap_header), then swapon. */
static void start_swapping(void)
{
    write_file("/sys/block/zram0/disksize", "67108864");
    char *page = calloc(1, page_size);
    uint32_t *header = (uint32_t *)(page + 1024);
    header[0] = 1;
    header[1] = AREA / page_size - 1;
    memcpy(page + page_size - 10, "SWAPSPACE2", 10);
    int descriptor = open("/dev/zram0", O_WRONLY);
    if (descriptor < 0 || write(descriptor, page, page_size) != (ssize_t)page_size || fsync(descriptor) < 0)
        say("note zram: %s", strerror(errno));
    close(descriptor);
    if (swapon("/dev/zram0", 0) < 0)
        say("note swapon: %s", strerror(errno));
}

static void mount_disk(void)
{
    int device = open("/dev/loop0", O_RDONLY), disk = open("/disk", O_RDONLY);
    if (device < 0 || disk < 0 || ioctl(device, LOOP_SET_FD, disk) < 0)
        say("note loop: %s", strerror(errno));
    mount_at("/dev/loop0", "ext4", "/mnt", MS_RDONLY, NULL);
    close(device);
    close(disk);
}

/* The words that stand in page `number` of the thing called `name`: so none is like another. */
static void fill(char *page, unsigned name, size_t number)
{
    for (size_t i = 0; i < page_size / 8; i++)
        ((uint64_t *)page)[i] = ((uint64_t)name << 56 ^ (number * page_size / 8 + i + 1)) * 0x9e3779b97f4a7c15ULL;
}

/* Whether neither mapped nor cached, page by page: '0' is gone (mincore(2)). */
static void residence(char *address, size_t pages, char *text)
{
    static unsigned char left[4096];
    if (pages > sizeof left || mincore(address, pages * page_size, left) < 0)
        die("mincore");
    for (size_t i = 0; i < pages; i++)
        text[i] = '0' + (left[i] & 1);
    text[pages] = '\0';
}

/* Ask until they are gone: pages that were just touched wait in lists where nobody looks for them. */
static void page_out(char *address, size_t pages)
{
    char text[65];
    for (int attempt = 0; attempt < 100; attempt++) {
        madvise(address, pages * page_size, 21);                 /* MADV_PAGEOUT, 5.4 on */
        residence(address, pages, text);
        if (!strchr(text, '1'))
            return;
        usleep(20000);
    }
    say("note pages stay: %s", text);
}

static char *map(size_t size, int rights, int flags, int descriptor)
{
    char *found = mmap(NULL, size, rights, flags, descriptor, 0);
    if (found == MAP_FAILED)
        die("mmap");
    return found;
}

static void hold_anonymous(void)
{
    char *at = map(48 * page_size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1);
    for (size_t i = 0; i < 48; i++)
        fill(at + i * page_size, 'a', i);
    page_out(at + 8 * page_size, 32);
    fprintf(list, "anonymous %llx 48 8 32\n", (unsigned long long)(uintptr_t)at);
    at = map(4 * page_size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1);
    for (size_t i = 0; i < 4; i++)
        fill(at + i * page_size, 'n', i);
    mprotect(at, 4 * page_size, PROT_NONE);
    fprintf(list, "closed %llx 4\n", (unsigned long long)(uintptr_t)at);
}

static void hold_shared(const char *word, const char *path, size_t pages, size_t first, size_t gone)
{
    int file = open(path, O_RDWR | O_CREAT, 0600);
    if (file < 0 || ftruncate(file, pages * page_size + 100) < 0)
        die(path);
    char *at = map(pages * page_size, PROT_READ | PROT_WRITE, MAP_SHARED, file);
    for (size_t i = 0; i < pages; i++)
        fill(at + i * page_size, word[0], i);
    if (gone)
        page_out(at + first * page_size, gone);
    fprintf(list, "%s %d %llx %zu %zu %zu\n", word, file, (unsigned long long)(uintptr_t)at, pages, first, gone);
}

/* A file of a disk: read whole, then a part of it given up. mincore tells what is left. */
static void hold_disk(void)
{
    static char buffer[65536];
    static char left[4097];
    struct stat status;
    int file = open("/mnt/data", O_RDONLY);
    if (file < 0 || fstat(file, &status) < 0) {
        say("note no disk");
        return;
    }
    posix_fadvise(file, 0, 0, POSIX_FADV_RANDOM);
    while (read(file, buffer, sizeof buffer) > 0)
        continue;
    posix_fadvise(file, 256 * 1024, 256 * 1024, POSIX_FADV_DONTNEED);
    size_t pages = (status.st_size + page_size - 1) / page_size;
    char *at = map(status.st_size, PROT_READ, MAP_PRIVATE, file);
    residence(at, pages, left);
    fprintf(list, "disk %d %llx %zu %s\n", file, (unsigned long long)(uintptr_t)at, pages, left);
}

static size_t huge_page_size(void)
{
    char line[100];
    size_t kilobytes = 0;
    FILE *file = fopen("/proc/meminfo", "re");
    while (file && fgets(line, sizeof line, file))
        sscanf(line, "Hugepagesize: %zu kB", &kilobytes);
    if (file)
        fclose(file);
    return kilobytes * 1024;
}

/* A file of hugetlbfs whose first and third page are written, and the second never was. */
static void hold_huge(void)
{
    size_t size = huge_page_size();
    int file = open("/hugetlb/pages", O_RDWR | O_CREAT, 0600);
    if (file < 0 || !size || ftruncate(file, 3 * size) < 0) {
        say("note no hugetlbfs");
        return;
    }
    char *at = mmap(NULL, 3 * size, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    if (at == MAP_FAILED) {
        say("note no huge pages");
        return;
    }
    for (size_t i = 0; i < 3 * size / page_size; i++)
        if (i / (size / page_size) != 1)
            fill(at + i * page_size, 't', i);
    fprintf(list, "hugetlb %d %llx %zu\n", file, (unsigned long long)(uintptr_t)at, size);
}

/* Two processes with the same pages in swap, some of which one of them has read again: those are in memory, in the
 * cache of swap, and the page tables of the other say that they are in swap. */
static void share(int told)
{
    size_t pages = 64, back = 8;
    char *at = map(pages * page_size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1);
    for (size_t i = 0; i < pages; i++)
        fill(at + i * page_size, 's', i);
    page_out(at, pages);
    int twin = fork();
    if (twin == 0)
        for (;;)
            pause();
    for (size_t i = 0; i < back; i++)
        (void)*(volatile char *)(at + i * page_size);
    fprintf(list, "twin %d %llx %zu %zu\n", twin, (unsigned long long)(uintptr_t)at, pages, back);
    fflush(list);
    if (write(told, "s", 1) != 1)
        die("init is gone");
    for (;;)
        pause();
}

static void hold(int told)
{
    prctl(PR_SET_NAME, "holder");
    fprintf(list, "pid %d\n", (int)getpid());
    hold_anonymous();
    hold_shared("small", "/tmp/small", 64, 16, 16);
    hold_shared("large", "/huge/large", 5 * MEBIBYTE / page_size, 0, 0);
    hold_disk();
    hold_huge();
    fflush(list);
    if (write(told, "h", 1) != 1)
        die("init is gone");
    for (;;)
        pause();
}

static void run_narrow(void)
{
    char *arguments[] = {"narrow", "of 32 bits", "/tmp/narrow", NULL}, *environment[] = {"WIDTH=32", NULL};
    int null = open("/dev/null", O_RDWR);
    for (int i = 0; i < 3; i++)
        dup2(null, i);
    execve("/bin/narrow", arguments, environment);
    _exit(127);
}

/* /proc/PID/syscall of all who sleep: number, arguments, stack pointer and program counter (proc(5)). */
static void note_system_calls(void)
{
    char path[300], text[300];
    struct dirent *entry;
    DIR *folder = opendir("/proc");
    while (folder && (entry = readdir(folder)) != NULL) {
        if (entry->d_name[0] < '0' || entry->d_name[0] > '9' || atoi(entry->d_name) == getpid())
            continue;
        snprintf(path, sizeof path, "/proc/%s/syscall", entry->d_name);
        int descriptor = open(path, O_RDONLY | O_CLOEXEC);
        ssize_t length = read(descriptor, text, sizeof text - 1);
        close(descriptor);
        if (length > 0) {
            text[length] = '\0';
            fprintf(list, "call %s %s", entry->d_name, text);
        }
    }
    closedir(folder);
}

static void add_text(const char *path)
{
    char line[300];
    FILE *file = fopen(path, "re");
    while (file && fgets(line, sizeof line, file))
        fputs(line, list);
    if (file)
        fclose(file);
}

int main(void)
{
    int told[2];
    char byte, line[64];

    page_size = sysconf(_SC_PAGESIZE);
    mount_at("proc", "proc", "/proc", 0, NULL);
    mount_at("sysfs", "sysfs", "/sys", 0, NULL);
    mount_at("devtmpfs", "devtmpfs", "/dev", 0, NULL);
    console_open();
    say("booted");
    mount_at("tmpfs", "tmpfs", "/tmp", 0, NULL);
    mount_at("tmpfs", "tmpfs", "/huge", 0, "huge=always,size=64M");
    write_file("/proc/sys/vm/nr_hugepages", "3");
    mount_at("hugetlbfs", "hugetlbfs", "/hugetlb", 0, NULL);
    load_modules();
    write_file("/proc/sys/kernel/kptr_restrict", "1");
    start_swapping();
    mount_disk();
    list = fopen("/tmp/secrets", "ae");
    if (!list || pipe(told) < 0)
        die("/tmp/secrets");
    if (fork() == 0)
        hold(told[1]);
    if (read(told[0], &byte, 1) != 1)
        die("holder is gone");
    if (fork() == 0)
        share(told[1]);
    if (read(told[0], &byte, 1) != 1)
        die("sharer is gone");
    if (access("/bin/narrow", X_OK) == 0) {
        if (fork() == 0)
            run_narrow();
        for (int i = 0; i < 500 && access("/tmp/narrow", F_OK) != 0; i++)
            usleep(20000);
        usleep(100000);
    }
    add_text("/tmp/narrow");
    note_system_calls();
    fclose(list);
    tell_truth();
    hear(line, sizeof line);
    say("ready");
    for (;;)
        pause();
}
