/* /init of a guest under load: children that are forked, call exec and end, each with a stamp of its own.
 *
 * A stamp stands at one fixed address in all of them: PID and start time as /proc/self/stat has it, twice. Keepers
 * live on. The first process says how many were started, once in a second.
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

static void stamp(void)
{
    void *place = mmap((void *)STAMP, 4096, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
    if (place != (void *)STAMP)
        _exit(1);
    STAMP[1] = getpid();
    STAMP[2] = started();
    STAMP[3] = STAMP[1] ^ STAMP[2];
    STAMP[0] = MARK;
}

static void rest(long milliseconds)
{
    struct timespec step = {milliseconds / 1000, milliseconds % 1000 * 1000000};
    nanosleep(&step, NULL);
}

int main(int count, char **arguments)
{
    if (count == 2) {                           /* a child after exec: how long it lives, 0 is for ever */
        long life = atol(arguments[1]);
        stamp();
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
    char *words = getenv("rate");
    long rate = words ? atol(words) : 200, made = 0;
    struct timespec now, begun;
    clock_gettime(CLOCK_MONOTONIC, &begun);
    for (int i = 0; i < 40; i++)
        if (fork() == 0)
            execl("/init", "lasting", "0", NULL);
    dprintf(1, "\n@cloudfs churning\n");
    for (long said = 0;;) {
        clock_gettime(CLOCK_MONOTONIC, &now);
        double passed = now.tv_sec - begun.tv_sec + (now.tv_nsec - begun.tv_nsec) / 1e9;
        for (; made < passed * rate; made++) {
            char life[16];
            snprintf(life, sizeof life, "%d", 1 + rand() % 400);
            pid_t child = fork();
            if (child == 0) {
                execl("/init", made % 2 ? "passing" : "fleeting", life, NULL);
                _exit(127);
            }
            if (child < 0)
                break;
        }
        while (waitpid(-1, NULL, WNOHANG) > 0)
            ;
        if ((long)passed > said)
            dprintf(1, "\n@cloudfs made %ld\n", made), said = (long)passed;
        rest(2);
    }
}
