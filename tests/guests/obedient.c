/* /init of a guest that does as it is told, a line on its console at a time.
 *
 * It has a secret that it writes anew every 100 ms, and a word that it reads as often: both where it says when it has
 * begun. Lines: `word` prints the word; `reboot`, `off`, `panic SECONDS` end the kernel; `pvpanic` tells QEMU of a
 * panic that was none; `kexec` starts the kernel in /next; `spin` has a process write the bytes around three free ones
 * until `still`, which says how often they were not what had been written just before.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/io.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <linux/reboot.h>
#include <time.h>
#include <unistd.h>

#define PVPANIC 0x505

static struct {
    char text[64];
    volatile uint64_t count, same, word;
} secret __attribute__((aligned(4096)));

/* Three bytes at an odd place, between two that a process of its own writes as fast as it can. */
static struct {
    volatile uint8_t left, free[3], right, pad[3];
    volatile uint64_t overwritten, rounds;
} *shared;
static pid_t spinner;

static void spin(void)
{
    for (uint8_t value = 0;; value++) {
        shared->left = value;
        shared->right = value;
        if (shared->left != value || shared->right != value)
            shared->overwritten++;
        shared->rounds++;
    }
}

static void write_to(const char *path, const char *text)
{
    int descriptor = open(path, O_WRONLY);
    if (descriptor < 0 || write(descriptor, text, strlen(text)) < 0)
        dprintf(1, "\n@cloudfs failed %s\n", path);
    close(descriptor);
}

static void change_kernel(void)
{
    static const char words[] = "console=ttyS0 rdinit=/init panic=-1 quiet no_timer_check second=yes";
    int kernel = open("/next/kernel", O_RDONLY), initramfs = open("/next/initramfs", O_RDONLY);
    if (syscall(SYS_kexec_file_load, kernel, initramfs, sizeof words, words, 0L) == 0)
        reboot(LINUX_REBOOT_CMD_KEXEC);
    dprintf(1, "\n@cloudfs failed kexec: %m\n");
}

static void obey(const char *line)
{
    if (strcmp(line, "word") == 0)
        dprintf(1, "\n@cloudfs word %lu\n", (unsigned long)secret.word);
    else if (strcmp(line, "reboot") == 0)
        reboot(RB_AUTOBOOT);
    else if (strcmp(line, "off") == 0)
        reboot(RB_POWER_OFF);
    else if (strncmp(line, "panic ", 6) == 0) {
        write_to("/proc/sys/kernel/panic", line + 6);
        write_to("/proc/sysrq-trigger", "c");
    }
    else if (strcmp(line, "pvpanic") == 0 && iopl(3) == 0)
        outb(1, PVPANIC);
    else if (strcmp(line, "kexec") == 0)
        change_kernel();
    else if (strcmp(line, "spin") == 0) {
        spinner = fork();
        if (spinner == 0)
            spin();
        dprintf(1, "\n@cloudfs spinning %d %lx\n", spinner, (unsigned long)shared);
    } else if (strcmp(line, "still") == 0) {
        kill(spinner, SIGKILL);
        waitpid(spinner, NULL, 0);
        dprintf(1, "\n@cloudfs overwritten %lu %lu\n", (unsigned long)shared->overwritten,
                (unsigned long)shared->rounds);
        shared->overwritten = shared->rounds = 0;
    }
}

int main(void)
{
    char line[64];
    size_t length = 0;
    mkdir("/proc", 0755);
    mount("proc", "/proc", "proc", 0, NULL);
    mkdir("/dev", 0755);
    mount("devtmpfs", "/dev", "devtmpfs", 0, NULL);
    int console = open("/dev/console", O_RDWR);
    for (int i = 0; i < 3; i++)
        dup2(console, i);
    for (int i = 0; i < 3; i++)                     /* processes that last, each a PID of its own */
        if (fork() == 0)
            for (;;)
                pause();
    shared = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    strcpy(secret.text, "cloudfs secret of the ");
    strcat(secret.text, "obedient guest ");
    dprintf(1, "\n@cloudfs ready %d %lx %s\n", getpid(), (unsigned long)&secret, getenv("second") ? "second" : "first");
    for (;;) {
        struct pollfd waited = {0, POLLIN, 0};
        if (poll(&waited, 1, 100) > 0) {
            if (read(0, line + length, 1) == 1 && line[length] != '\n' && length < sizeof line - 1) {
                length++;
                continue;
            }
            line[length] = '\0';
            length = 0;
            obey(line);
        }
        secret.count++;
        secret.same = secret.count;
    }
}
