/* The processes of a guest: ordinary ones of many kinds, each with something of its own. */
#include "guest.h"

#include <dirent.h>
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { IN_NAMESPACES = 1, IN_JAIL = 2, STOPPED = 4, ZOMBIE = 8, IN_CGROUP = 16 };

struct process {
    const char *arguments[6];
    const char *program;                        /* in /bin, where it is not the first argument */
    const char *environment[3];
    const char *folder;
    const char *output;                         /* a file for its standard output */
    uid_t user;
    int kind;
};

static const struct process processes[] = {
    {.arguments = {"sleep", "100001"}},
    {.arguments = {"sleep", "100002"}},
    {.arguments = {"sleep", "100003"}, .environment = {"COLOUR=green and blue", "EMPTY="}},
    {.arguments = {"sleep", "100004"}, .user = 1000, .folder = "/home/ada"},
    {.arguments = {"sleep", "100005"}, .user = 1001, .folder = "/home/bob"},
    {.arguments = {"sh", "-c", "while :; do sleep 100006; done", "an argument with spaces", ""}},
    {.arguments = {"sleep", "100007"}, .output = "/tmp/output file"},
    {.arguments = {"sleep", "100008"}, .kind = IN_NAMESPACES},
    {.arguments = {"sleep", "100009"}, .kind = IN_JAIL},
    {.arguments = {"sleep", "100010"}, .kind = STOPPED},
    {.arguments = {"sleep", "100011"}, .kind = IN_CGROUP},
    {.arguments = {"true"}, .kind = ZOMBIE},
    {.arguments = {"tail", "-f", "/etc/passwd"}},
    {.arguments = {"nc", "-l", "-p", "7100"}},
    {.arguments = {"nc", "127.0.0.1", "7100"}},
    {.arguments = {"httpd", "-f", "-p", "127.0.0.1:7200", "-h/tmp"}},
    {.arguments = {"syslogd", "-n", "-O", "/tmp/messages"}},
    {.arguments = {"sh", "-c", "cat | sleep 100012"}},
    {.arguments = {"renamed one", "--idle"}, .program = "keeper"},
    {.arguments = {"sh", "-c", "exec 9<>/tmp/gone; rm /tmp/gone; exec sleep 100014"}},
};

static int silence[2];                           /* a pipe into which nobody writes: nc ends with its input */

static void be(const struct process *self)
{
    char path[] = "PATH=/bin:/sbin", program[64];
    int descriptor = open("/dev/null", O_RDWR);
    for (int i = 0; i < 3; i++)
        dup2(descriptor, i);
    close(descriptor);
    if (strcmp(self->arguments[0], "nc") == 0)
        dup2(silence[0], 0);
    if (self->output && (descriptor = open(self->output, O_WRONLY | O_CREAT | O_APPEND, 0600)) >= 0) {
        dup2(descriptor, 1);
        close(descriptor);
    }
    if (self->kind & IN_CGROUP) {
        mkdir("/sys/fs/cgroup/box", 0755);
        if ((descriptor = open("/sys/fs/cgroup/box/cgroup.procs", O_WRONLY)) >= 0) {
            if (write(descriptor, "0", 1) < 0)
                say("note cgroup");
            close(descriptor);
        }
    }
    if (self->kind & IN_NAMESPACES) {
        if (unshare(CLONE_NEWUTS | CLONE_NEWNET | CLONE_NEWPID | CLONE_NEWNS | CLONE_NEWIPC) < 0)
            say("note namespaces");
        sethostname("boxed", 5);
        if (fork() > 0) {                       /* only a child is in the new pid namespace */
            for (;;)
                pause();
        }
    }
    if (self->kind & IN_JAIL && chroot("/jail") < 0)
        say("note jail");
    if (chdir(self->folder ? self->folder : "/") < 0)
        say("note folder %s", self->folder);
    if (self->user && (setgid(self->user) < 0 || setuid(self->user) < 0))
        say("note user %d", (int)self->user);
    const char *environment[] = {path, self->environment[0], self->environment[1], NULL};
    snprintf(program, sizeof program, "/bin/%s", self->program ? self->program : self->arguments[0]);
    execve(program, (char **)self->arguments, (char **)environment);
    _exit(127);
}

void start_processes(void)
{
    if (pipe2(silence, O_CLOEXEC) < 0)
        die("pipe");
    mkdir("/home", 0755);
    mkdir("/home/ada", 0755);
    mkdir("/home/bob", 0755);
    for (size_t i = 0; i < sizeof processes / sizeof *processes; i++) {
        pid_t child = fork();
        if (child == 0)
            be(&processes[i]);
        if (strcmp(processes[i].arguments[0], "nc") == 0)
            wait_until_asleep();                /* the one that listens comes before the one that connects */
        if (processes[i].kind & STOPPED) {
            wait_until_asleep();
            kill(child, SIGSTOP);
        }
    }
}

static char state_of(const char *pid)
{
    char path[64], text[256];
    snprintf(path, sizeof path, "/proc/%s/stat", pid);
    int descriptor = open(path, O_RDONLY | O_CLOEXEC);
    ssize_t length = descriptor < 0 ? -1 : read(descriptor, text, sizeof text - 1);
    close(descriptor);
    if (length <= 0)
        return 'Z';
    text[length] = '\0';
    char *after_name = strrchr(text, ')');
    return after_name && after_name[1] ? after_name[2] : 'Z';
}

static int runs_anything(void)
{
    DIR *folder = opendir("/proc");
    struct dirent *entry;
    int running = 0;
    while (folder && (entry = readdir(folder)) != NULL) {
        if (entry->d_name[0] < '0' || entry->d_name[0] > '9' || atoi(entry->d_name) == getpid())
            continue;
        char state = state_of(entry->d_name);
        running += state == 'R' || state == 'D';
    }
    closedir(folder);
    return running;
}

/* Until nothing but us has run for four looks in a row; at most about ten seconds. */
void wait_until_asleep(void)
{
    struct timespec step = {.tv_nsec = 10 * 1000 * 1000};
    for (int looks = 0, quiet = 0; looks < 1000 && quiet < 4; looks++) {
        nanosleep(&step, NULL);
        quiet = runs_anything() ? 0 : quiet + 1;
    }
}
