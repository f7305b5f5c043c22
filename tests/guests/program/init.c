/* /init: brings the guest up, lets it tell the truth, and hands the processor to the keeper. */
#include "guest.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <net/if.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/klog.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

void die(const char *what)
{
    say("failed %s: %s", what, strerror(errno));
    if (getpid() == 1)
        reboot(RB_POWER_OFF);
    _exit(1);
}

static void mount_at(const char *kind, const char *place, int needed)
{
    mkdir(place, 0755);
    if (mount(kind, place, kind, 0, NULL) < 0 && needed)
        die(place);
}

static void write_file(const char *path, const char *text)
{
    int descriptor = open(path, O_WRONLY | O_CREAT | O_TRUNC, 0644);
    if (descriptor < 0)
        return;
    if (write(descriptor, text, strlen(text)) < 0)
        say("note %s: %s", path, strerror(errno));
    close(descriptor);
}

static void bring_up_loopback(void)
{
    struct ifreq request = {.ifr_name = "lo"};
    int descriptor = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    ioctl(descriptor, SIOCGIFFLAGS, &request);
    request.ifr_flags |= IFF_UP | IFF_RUNNING;
    if (ioctl(descriptor, SIOCSIFFLAGS, &request) < 0)
        say("note loopback: %s", strerror(errno));
    close(descriptor);
}

/* Their files are numbered in the order in which they need one another; a kernel may lack some. */
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

static void prepare(void)
{
    mount_at("proc", "/proc", 1);
    mount_at("sysfs", "/sys", 1);
    mount_at("devtmpfs", "/dev", 1);
    console_open();
    klogctl(6, NULL, 0);                        /* SYSLOG_ACTION_CONSOLE_OFF: no kernel message within our lines */
    say("booted");
    mount_at("tmpfs", "/tmp", 1);
    mount_at("cgroup2", "/sys/fs/cgroup", 0);
    mount_at("devpts", "/dev/pts", 0);
    sethostname("cloudfs-guest", 13);
    bring_up_loopback();
    load_modules();
    if (link("/init", "/bin/keeper") < 0)
        die("/bin/keeper");
    write_file("/proc/sys/kernel/kptr_restrict", "1");      /* root sees addresses, not sums of them */
    write_file("/proc/sys/vm/nr_hugepages", "2");
    write_file("/sys/kernel/mm/transparent_hugepage/enabled", "madvise");
    write_file("/sys/kernel/mm/transparent_hugepage/khugepaged/pages_to_scan", "1");
    write_file("/sys/kernel/mm/ksm/run", "0");
}

/* The collector is a process of its own: what it used is gone before the guest is stopped. */
static void collect(void)
{
    pid_t collector = fork();
    if (collector == 0) {
        tell_truth();
        _exit(0);
    }
    if (collector < 0 || waitpid(collector, NULL, 0) < 0)
        die("collector");
}

static void shell(void)
{
    pid_t child = fork();
    if (child == 0) {
        setsid();
        ioctl(0, TIOCSCTTY, 1);
        setenv("PATH", "/bin", 1);
        execl("/bin/busybox", "sh", "-i", NULL);
        _exit(127);
    }
    console_for_people(1);
    waitpid(child, NULL, 0);
    console_for_people(0);
}

int main(int count, char **arguments)
{
    int command[2], answer[2];
    char line[64], byte;

    if (count == 4 && strcmp(arguments[1], "--keep") == 0)
        return keeper_main(atoi(arguments[2]), atoi(arguments[3]));
    if (count == 2 && strcmp(arguments[1], "--idle") == 0)
        for (;;)
            pause();
    prepare();
    start_processes();
    if (pipe(command) < 0 || pipe(answer) < 0)
        die("pipe");
    if (fork() == 0) {
        char in[12], out[12];
        close(command[1]);
        close(answer[0]);
        snprintf(in, sizeof in, "%d", command[0]);
        snprintf(out, sizeof out, "%d", answer[1]);
        setenv("KEEPER", "of secrets", 1);
        execl("/bin/keeper", "keeper", "--keep", in, out, NULL);
        die("keeper");
    }
    close(command[0]);
    close(answer[1]);
    if (read(answer[0], &byte, 1) != 1 || write(command[1], "p", 1) != 1 || read(answer[0], &byte, 1) != 1)
        die("keeper has not answered");
    wait_until_asleep();
    collect();
    if (hear(line, sizeof line) > 0 && strcmp(line, "shell") == 0)
        shell();
    if (write(command[1], "g", 1) != 1)
        die("keeper is gone");
    for (;;)
        pause();
}
