/* A program with known things in its memory. It prints `name value` lines, then `ready`, then obeys standard
 * input: `exec` runs it anew, `vfork` starts a child in its own memory, end of file ends it. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#define PAGE 4096UL
#define PATTERN_SIZE (4UL << 20)
#define FIXED ((void *)0x200000000000)

char in_data[64] = "secret in .data";
uint64_t counter = 1234567890123456789ULL;
static const char in_rodata[] = "secret in .rodata";

static char *map(size_t size, int protection, int flags, int descriptor)
{
    char *at = mmap(NULL, size, protection, flags, descriptor, 0);
    if (at == MAP_FAILED) {
        perror("mmap");
        exit(1);
    }
    return at;
}

static void say(const char *name, const void *value)
{
    printf("%s %lu\n", name, (unsigned long)value);
}

static void fill(char *at, size_t size)
{
    for (size_t i = 0; i < size / 4; i++)
        ((uint32_t *)at)[i] = (uint32_t)(i * 2654435761u);
}

static void *idle(void *name)
{
    prctl(PR_SET_NAME, name, 0, 0, 0);
    for (;;)
        pause();
    return NULL;
}

static unsigned long start_ticks(void)
{
    char text[1024], *at;
    int descriptor = open("/proc/self/stat", O_RDONLY);
    ssize_t size = read(descriptor, text, sizeof text - 1);
    close(descriptor);
    text[size > 0 ? size : 0] = 0;
    at = strrchr(text, ')');
    for (int field = 2; field < 22; field++)
        at = strchr(at, ' ') + 1;
    return strtoul(at, NULL, 10);
}

/* Children that stamp a page with who they are, live some milliseconds and end, without end. */
static int breed(int alive)
{
    fcntl(0, F_SETFL, O_NONBLOCK);
    for (int living = 0;; living++) {
        char byte;
        if (living >= alive)
            wait(NULL);
        if (read(0, &byte, 1) == 0)
            break;
        if (fork() == 0) {
            uint64_t *page = mmap(FIXED, 64 * PAGE, PROT_READ | PROT_WRITE,
                                  MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
            uint64_t who = (uint64_t)getpid() << 32 | (uint32_t)start_ticks();
            for (size_t i = 0; i < 64 * PAGE / 8; i++)
                page[i] = who;
            usleep(20000 + rand() % 20000);
            _exit(0);
        }
    }
    while (wait(NULL) > 0)
        ;
    return 0;
}

/* A child in our own memory, as posix_spawn makes one: it says its PID and starts `sleep` when told to. */
static void spawn_in_vfork(void)
{
    static char byte;
    pid_t child = vfork();
    if (child == 0) {
        char text[32];
        int size = snprintf(text, sizeof text, "child %d\n", (int)getpid());
        if (write(1, text, size) == size && read(0, &byte, 1) == 1)
            execlp("sleep", "sleep", "60", (char *)NULL);
        _exit(1);
    }
    printf("spawned %d\n", (int)child);
    fflush(stdout);
}

int main(int argc, char **argv)
{
    char in_stack[64] = "secret on the stack";
    if (argc > 2 && !strcmp(argv[1], "breed"))
        return breed(atoi(argv[2]));
    setvbuf(stdin, NULL, _IONBF, 0);
    prctl(0x59616d61 /* PR_SET_PTRACER */, -1L, 0, 0, 0);

    char *in_heap = strcpy(malloc(64), "secret in the heap");
    char *pattern = map(PATTERN_SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1);
    fill(pattern, PATTERN_SIZE);
    /* |  data  |  data  |  hole  |  data  | */
    char *island = map(4 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1);
    fill(island, 4 * PAGE);
    /* |  data  |  never touched, 6 pages  |  data  | */
    char *sparse = map(8 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1);
    fill(sparse, PAGE);
    fill(sparse + 7 * PAGE, PAGE);
    /* |  data, PROT_NONE  |  PROT_NONE, never touched  | */
    char *forbidden = map(2 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1);
    fill(forbidden, PAGE);
    mprotect(forbidden, 2 * PAGE, PROT_NONE);
    char *read_only = map(PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1);
    fill(read_only, PAGE);
    mprotect(read_only, PAGE, PROT_READ);
    /* page 0 written by us, page 5 by a child that has ended, page 9 by nobody */
    char *shared = map(16 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1);
    fill(shared, PAGE);
    if (fork() == 0) {
        fill(shared + 5 * PAGE, PAGE);
        _exit(0);
    }
    wait(NULL);
    /* a private mapping of a memfd with 100 bytes, 2 pages long: the second one has no file behind it */
    int memfd = syscall(SYS_memfd_create, "a name with spaces", 0);
    if (write(memfd, in_rodata, sizeof in_rodata) < 0 || ftruncate(memfd, 100) < 0)
        return 1;
    char *of_memfd = map(2 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE, memfd);
    char *reserve = map(1UL << 40, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1);
    char *shared_reserve = map(1UL << 36, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS | MAP_NORESERVE, -1);
    char *huge = mmap(NULL, 4UL << 20, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_HUGETLB, -1, 0);
    char *guarded = map(3 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1);
    fill(guarded, 3 * PAGE);
    if (madvise(guarded + PAGE, PAGE, 102 /* MADV_GUARD_INSTALL */) == 0)
        say("guarded", guarded);
    pthread_t thread;
    pthread_create(&thread, NULL, idle, "a (thread) name");
    prctl(PR_SET_NAME, argc > 1 ? argv[1] : "target", 0, 0, 0);
    munmap(island + 2 * PAGE, PAGE); /* late: another mapping would take its place */

    say("in_data", in_data);
    say("counter", &counter);
    say("in_rodata", in_rodata);
    say("in_stack", in_stack);
    say("in_heap", in_heap);
    say("pattern", pattern);
    say("island", island);
    say("sparse", sparse);
    say("forbidden", forbidden);
    say("read_only", read_only);
    say("shared", shared);
    say("of_memfd", of_memfd);
    say("reserve", reserve);
    say("shared_reserve", shared_reserve);
    if (huge != MAP_FAILED)
        say("huge", huge);
    printf("ready 0\n");
    fflush(stdout);

    for (;;) {
        char line[64];
        if (!fgets(line, sizeof line, stdin))
            return 0;
        if (!strcmp(line, "exec\n"))
            execv("/proc/self/exe", argv);
        if (!strcmp(line, "vfork\n"))
            spawn_in_vfork();
        if (!strcmp(line, "counter\n")) {
            printf("counter %lu\n", counter);
            fflush(stdout);
        }
    }
}
