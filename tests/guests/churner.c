/* /init of a guest under load: children that are forked, call exec and end, each with a stamp of its own.
 *
 * A stamp stands at one fixed address in all of them, two pages of it: PID, start time as /proc/self/stat has it, how
 * long it lives, its number among all children, where its arguments lie; then words that follow from that number, so
 * that no part of one can be taken for another's. Keepers live on. The first process says how many were started.
 *
 * Words of the kernel's command line: rate= (children in a second), pids= (kernel.pid_max: numbers come round soon).
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>

#define STAMP ((volatile uint64_t *)0x7e5700000000)
#define MARK 0x6c75666573746d70
#define BYTES 8192
#define HEAD 8                                  /* words before those that follow from the number */
#define FACTOR 0x9e3779b97f4a7c15
#define KEEPERS 40
#define AT_ONCE 4

static uint64_t started(void)
{
    char text[1024];
    int descriptor = open("/proc/self/stat", O_RDONLY);
    ssize_t length = read(descriptor, text, sizeof text - 1);
    close(descriptor);
    text[length > 0 ? length : 0] = '\0';
    char *at = strrchr(text, ')');
    for (int field = 2; at && field < 22; field++)
        at = strchr(at + 1, ' ');
    return at ? strtoull(at, NULL, 10) : 0;
}

static void stamp(long life, long number, const char *words)
{
    void *place = mmap((void *)STAMP, BYTES, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
    if (place != (void *)STAMP)
        _exit(1);
    for (int word = HEAD; word < BYTES / 8; word++)
        STAMP[word] = (number + 1) * FACTOR + word;
    STAMP[1] = getpid();
    STAMP[2] = started();
    STAMP[3] = life;
    STAMP[4] = number;
    STAMP[5] = (uintptr_t)words;
    STAMP[6] = STAMP[1] ^ STAMP[2] ^ STAMP[3] ^ STAMP[4] ^ STAMP[5];
    STAMP[0] = MARK;                            /* last: from now on it is whole */
}

static void rest(long milliseconds)
{
    struct timespec step = {milliseconds / 1000, milliseconds % 1000 * 1000000};
    nanosleep(&step, NULL);
}

static int begin(const char *name, long life, long number)
{
    pid_t child = fork();
    if (child == 0) {
        char words[2][24];
        snprintf(words[0], sizeof words[0], "%ld", life);
        snprintf(words[1], sizeof words[1], "%ld", number);
        execl("/init", name, words[0], words[1], NULL);
        _exit(127);
    }
    return child > 0;
}

static long some_life(void)                     /* milliseconds: most of them short, few of several seconds */
{
    long kind = rand() % 20;
    return kind < 12 ? 50 + rand() % 350 : kind < 19 ? 400 + rand() % 600 : 2000 + rand() % 3000;
}

static long told(const char *name, long otherwise)
{
    const char *word = getenv(name);
    return word ? atol(word) : otherwise;
}

int main(int count, char **arguments)
{
    if (count == 3) {                           /* a child after exec: how long it lives (0 is for ever), its number */
        long life = atol(arguments[1]);
        stamp(life, atol(arguments[2]), arguments[0]);
        if (life == 0)
            for (;;)
                pause();
        rest(life);
        return 0;
    }
    mkdir("/proc", 0755);
    mount("proc", "/proc", "proc", 0, NULL);
    mkdir("/dev", 0755);
    mount("devtmpfs", "/dev", "devtmpfs", 0, NULL);
    int console = open("/dev/console", O_RDWR);
    for (int i = 0; i < 3; i++)
        dup2(console, i);
    int limit = open("/proc/sys/kernel/pid_max", O_WRONLY);
    if (limit < 0 || dprintf(limit, "%ld\n", told("pids", 32768)) < 0)
        dprintf(1, "\n@cloudfs failed to set kernel.pid_max\n");
    close(limit);
    long rate = told("rate", 200), made = 0;
    for (long i = 0; i < KEEPERS; i++)
        begin("lasting", 0, -1 - i);
    struct timespec now, begun;
    clock_gettime(CLOCK_MONOTONIC, &begun);
    dprintf(1, "\n@cloudfs churning\n");
    for (long said = 0;;) {
        clock_gettime(CLOCK_MONOTONIC, &now);
        double passed = now.tv_sec - begun.tv_sec + (now.tv_nsec - begun.tv_nsec) / 1e9;
        for (int i = 0; i < AT_ONCE && made < passed * rate; i++) {
            if (!begin(made % 2 ? "passing" : "fleeting", some_life(), made))
                break;
            made++;
        }
        while (waitpid(-1, NULL, WNOHANG) > 0)  /* also where the machine is too slow for that rate */
            ;
        if ((long)passed > said)
            dprintf(1, "\n@cloudfs made %ld\n", made), said = (long)passed;
        rest(2);
    }
}
