/* The process that holds the secrets: known text in every kind of memory that a process has.
 *
 * It writes where they are to /tmp/secrets: name, address, and for pages that nobody may read the bytes that
 * /proc/self/mem gives. The text of a secret follows from its name alone, so that no list of texts lies in memory.
 */
#include "guest.h"

#include <fcntl.h>
#include <netinet/in.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <unistd.h>

#define MEBIBYTE (1024UL * 1024)

static FILE *list;
static size_t page_size;
static char in_data[SECRET_SIZE] = "to be overwritten";
static char in_bss[SECRET_SIZE];
static __thread char in_thread_local[SECRET_SIZE];

/* "cloudfs secret NAME " and the FNV-1a sum of the name in hexadecimal, filled with dots. */
void secret_text(const char *name, char *text)
{
    char made[SECRET_SIZE + 1];
    uint64_t sum = 0xcbf29ce484222325ULL;
    for (const char *at = name; *at; at++)
        sum = (sum ^ (unsigned char)*at) * 0x100000001b3ULL;
    int length = snprintf(made, sizeof made, "cloudfs secret %s %016llx", name, (unsigned long long)sum);
    memset(text, '.', SECRET_SIZE);
    memcpy(text, made, length < SECRET_SIZE ? length : SECRET_SIZE);
    explicit_bzero(made, sizeof made);
}

static void note(const char *name, const void *address)
{
    fprintf(list, "secret %s %llx\n", name, (unsigned long long)(uintptr_t)address);
}

static void keep(const char *name, void *address)
{
    secret_text(name, address);
    note(name, address);
}

static char *map(size_t size, int rights, int flags, int descriptor)
{
    void *found = mmap(NULL, size, rights, flags, descriptor, 0);
    return found == MAP_FAILED ? NULL : found;
}

/* What /proc/self/mem gives of memory that we may not read ourselves. */
static void read_back(const char *name, const char *address)
{
    unsigned char bytes[SECRET_SIZE];
    int descriptor = open("/proc/self/mem", O_RDONLY | O_CLOEXEC);
    ssize_t length = pread64(descriptor, bytes, sizeof bytes, (off64_t)(uintptr_t)address);
    fprintf(list, "read %s ", name);
    for (ssize_t i = 0; i < length; i++)
        fprintf(list, "%02x", bytes[i]);
    fprintf(list, length > 0 ? "\n" : "-\n");
    explicit_bzero(bytes, sizeof bytes);
    close(descriptor);
}

static void keep_in_anonymous(const char *name, size_t size, int rights)
{
    char *at = map(size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1);
    if (!at)
        return;
    char *secret = at + size / 2 / page_size * page_size + 128;
    keep(name, secret);
    if (mprotect(at, size, rights) == 0)
        read_back(name, secret);
}

static void keep_in_files(void)
{
    char text[SECRET_SIZE];
    int shared = open("/tmp/shared", O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    int deleted = open("/tmp/deleted", O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    int nameless = syscall(SYS_memfd_create, "nameless", 0);
    int private = open("/tmp/private", O_RDWR | O_CREAT, 0600);
    if (ftruncate(shared, MEBIBYTE) < 0 || ftruncate(deleted, MEBIBYTE) < 0 || ftruncate(nameless, MEBIBYTE) < 0)
        die("files");
    secret_text("private-file", text);
    if (pwrite(private, text, SECRET_SIZE, page_size) != SECRET_SIZE)
        die("private file");
    explicit_bzero(text, sizeof text);
    keep("shared-file", map(MEBIBYTE, PROT_READ | PROT_WRITE, MAP_SHARED, shared) + 5 * page_size);
    keep("deleted-file", map(MEBIBYTE, PROT_READ | PROT_WRITE, MAP_SHARED, deleted) + 3 * page_size + 7);
    keep("memfd", map(MEBIBYTE, PROT_READ | PROT_WRITE, MAP_SHARED, nameless));
    char *at = map(2 * page_size, PROT_READ, MAP_PRIVATE, private);
    note("private-file", at + page_size + 0 * *(volatile char *)(at + page_size));
    unlink("/tmp/deleted");
}

static void keep_in_huge_pages(void)
{
    size_t size = 80 * MEBIBYTE;                 /* holds an aligned 32 MiB, the largest of these guests */
    size_t huge = 2 * MEBIBYTE;
    FILE *told = fopen("/sys/kernel/mm/transparent_hugepage/hpage_pmd_size", "r");
    if (told && fscanf(told, "%zu", &huge) != 1)
        huge = 2 * MEBIBYTE;
    if (told)
        fclose(told);
    char *at = map(size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1);
    if (told && at && huge <= size / 2) {
        char *aligned = (char *)(((uintptr_t)at + huge - 1) / huge * huge);
        madvise(aligned, huge, MADV_HUGEPAGE);
        keep("transparent-huge", aligned + huge / 2 + 3 * page_size + 64);
    }
    at = map(huge, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_HUGETLB, -1);
    if (at)
        keep("hugetlb", at + huge - SECRET_SIZE);
    at = map(huge, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_HUGETLB, -1);
    if (at) {
        keep("hugetlb-no-access", at + huge / 2);
        if (mprotect(at, huge, PROT_NONE) == 0)
            read_back("hugetlb-no-access", at + huge / 2);
    }
}

/* Addresses above the usual ones must be asked for, see Documentation/arch/x86/x86_64/5level-paging.rst. */
static void keep_high(void)
{
#if UINTPTR_MAX > 0xffffffffUL
    static const int bits[] = {55, 51, 46, 37};
    for (size_t i = 0; i < sizeof bits / sizeof *bits; i++) {
        void *wanted = (void *)((1UL << bits[i]) + (1UL << (bits[i] - 1)));
        char *at = mmap(wanted, page_size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (at == wanted) {
            keep("high", at + page_size - SECRET_SIZE);
            return;
        }
    }
#endif
}

/* Two neighbouring pages that do not come from one allocation, and a text that lies in both. */
static void keep_across_pages(void)
{
    char *at = map(2 * page_size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1);
    at[page_size] = 1;
    for (int i = 0; i < 3; i++)
        *map(page_size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1) = 1;
    keep("across-pages", at + page_size - SECRET_SIZE / 2);
}

static void leave_unwritten(void)
{
    char *untouched = map(16 * page_size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1);
    char *zero = map(page_size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1);
    volatile char look = *(volatile char *)zero;
    fprintf(list, "untouched %llx %zu\nzero %llx %zu\n", (unsigned long long)(uintptr_t)untouched, 16 * page_size,
            (unsigned long long)(uintptr_t)zero, page_size + 0 * look);
}

static pthread_barrier_t ready;

static void *thread(void *name)
{
    char in_stack[SECRET_SIZE], full[32];
    snprintf(full, sizeof full, "stack-of-%s", (const char *)name);
    prctl(PR_SET_NAME, name);
    keep(full, in_stack);
    snprintf(full, sizeof full, "local-of-%s", (const char *)name);
    keep(full, in_thread_local);
    pthread_barrier_wait(&ready);
    for (;;)
        pause();
    return NULL;
}

static void start_threads(void)
{
    static char *names[] = {"keeper-one", "keeper-two"};
    pthread_t started;
    for (int i = 0; i < 2; i++) {
        pthread_barrier_init(&ready, NULL, 2);
        if (pthread_create(&started, NULL, thread, names[i]) != 0)
            die("thread");
        pthread_barrier_wait(&ready);
        pthread_barrier_destroy(&ready);
    }
}

static void open_sockets(void)
{
    struct sockaddr_in place = {.sin_family = AF_INET, .sin_port = htons(7001), .sin_addr.s_addr = htonl(0x7f000001)};
    struct sockaddr_un path = {.sun_family = AF_UNIX, .sun_path = "/tmp/keeper.socket"};
    struct sockaddr_un abstract = {.sun_family = AF_UNIX, .sun_path = "\0keeper of secrets"};
    int listening = socket(AF_INET, SOCK_STREAM, 0), calling = socket(AF_INET, SOCK_STREAM, 0), ends[2];
    bind(listening, (struct sockaddr *)&place, sizeof place);
    listen(listening, 5);
    if (connect(calling, (struct sockaddr *)&place, sizeof place) < 0 || accept(listening, NULL, NULL) < 0)
        say("note tcp");
    place.sin_port = htons(7002);
    if (bind(socket(AF_INET, SOCK_DGRAM, 0), (struct sockaddr *)&place, sizeof place) < 0)
        say("note udp");
    int local = socket(AF_UNIX, SOCK_STREAM, 0);
    bind(local, (struct sockaddr *)&path, sizeof path);
    listen(local, 1);
    bind(socket(AF_UNIX, SOCK_DGRAM, 0), (struct sockaddr *)&abstract, sizeof(sa_family_t) + 18);
    if (socketpair(AF_UNIX, SOCK_STREAM, 0, ends) < 0 || pipe(ends) < 0)
        say("note pairs");
    eventfd(3, 0);
    epoll_create1(0);
    lseek(open("/etc/passwd", O_RDONLY), 5, SEEK_SET);
    open("/tmp", O_RDONLY | O_DIRECTORY);
}

/* Same addresses, other frames: after fork it has rewritten what it held in common with us. */
static void start_twin(char *shared_until_written)
{
    int told[2];
    char byte;
    if (pipe2(told, O_CLOEXEC) < 0)
        die("pipe");
    pid_t twin = fork();
    if (twin == 0) {
        prctl(PR_SET_NAME, "twin");
        secret_text("twin", shared_until_written);
        if (write(told[1], "t", 1) < 0)
            _exit(1);
        for (;;)
            pause();
    }
    if (twin < 0 || read(told[0], &byte, 1) != 1)
        die("twin");
    close(told[0]);
    close(told[1]);
    fprintf(list, "twin %d %llx\n", (int)twin, (unsigned long long)(uintptr_t)shared_until_written);
}

int keeper_main(int command, int answer)
{
    char in_stack[SECRET_SIZE], byte;

    page_size = sysconf(_SC_PAGESIZE);
    prctl(PR_SET_NAME, "keeper");
    list = fopen("/tmp/secrets", "we");
    if (!list)
        die("/tmp/secrets");
    fprintf(list, "pid %d\n", (int)getpid());
    keep("data", in_data);
    keep("bss", in_bss);
    keep("stack", in_stack);
    keep("heap", malloc(SECRET_SIZE));
    keep_in_anonymous("anonymous", MEBIBYTE, PROT_READ | PROT_WRITE);
    keep_in_anonymous("read-only", page_size, PROT_READ);
    keep_in_anonymous("executable", 2 * page_size, PROT_READ | PROT_EXEC);
    keep_in_anonymous("no-access", page_size, PROT_NONE);
    keep_in_anonymous("no-access-among-many", 8 * page_size, PROT_NONE);
    keep_in_files();
    keep_in_huge_pages();
    keep_high();
    keep_across_pages();
    leave_unwritten();
    start_threads();
    open_sockets();
    start_twin(in_data);
    fprintf(list, "code %llx\n", (unsigned long long)(uintptr_t)keeper_main);
    fclose(list);
    /* Once for practice: what is written then has been copied from pages shared with the twin, and what is run then
     * has been mapped, before the guest tells which frames we have. */
    for (byte = 'p'; byte != 'g';) {
        if (write(answer, "r", 1) != 1 || read(command, &byte, 1) != 1)
            die("init is gone");
        say(byte == 'g' ? "ready" : "practice");
    }
    for (;;)
        __asm__ volatile("" ::: "memory");
}
