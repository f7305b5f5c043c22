/*
 * What pyfuse3 leaves out of libfuse: FUSE_LSEEK, so that programs skip the holes of a file, FOPEN_NOFLUSH, so that
 * closing a file is one request and not two, and shortcuts, so that plain reads and writes cost no Python.
 *
 * Loaded with RTLD_GLOBAL before pyfuse3, it stands in front of four functions of libfuse. It is linked to nothing:
 * the true ones are looked up in what pyfuse3 itself was linked to. Where that is another release than the headers
 * that this was compiled with, it passes all calls on and adds nothing.
 */
#define _GNU_SOURCE
#define FUSE_USE_VERSION 32
#include <dlfcn.h>
#include <errno.h>
#include <fuse_lowlevel.h>
#include <fcntl.h>
#include <linux/fuse.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#define PUBLIC __attribute__((visibility("default")))
#ifndef SYS_pidfd_send_signal
#define SYS_pidfd_send_signal 424 /* Linux 5.1; the same on all machines but alpha */
#endif

typedef void (*seek_handler)(void *request, uint64_t inode, uint64_t handle, int64_t offset, int whence);

enum { IDLE, SERVING, OTHER_RELEASE, INCOMPLETE };

/* Handles with this bit belong to files that want to hear of every close(2). */
static const uint64_t FLUSHED = UINT64_C(1) << 62;

static seek_handler handler;
static int state = IDLE;
static struct fuse_session *made; /* the last one */
static int hasty;                 /* its receive() answers what it can, and never waits */
static int running_release;
static int (*true_reply_open)(fuse_req_t, const struct fuse_file_info *);
static int (*true_reply_err)(fuse_req_t, int);
static int (*true_reply_lseek)(fuse_req_t, off_t);
static int (*true_receive)(struct fuse_session *, struct fuse_buf *);
static int (*session_fd)(struct fuse_session *);

/* In newer headers fuse_session_new is a macro or an inline function: hence the labels. */
PUBLIC struct fuse_session *session_new(struct fuse_args *, const struct fuse_lowlevel_ops *, size_t, void *)
    __asm__("fuse_session_new");
PUBLIC struct fuse_session *session_new_versioned(struct fuse_args *, const struct fuse_lowlevel_ops *, size_t,
                                                  void *version, void *) __asm__("fuse_session_new_versioned");
PUBLIC int reply_open(fuse_req_t, const struct fuse_file_info *) __asm__("fuse_reply_open");
PUBLIC int receive(struct fuse_session *, struct fuse_buf *) __asm__("fuse_session_receive_buf");

/* Called before the session is made; NULL: add nothing. */
PUBLIC void cloudfs_shim_begin(seek_handler given) {
    handler = given;
    state = IDLE;
    hasty = 0;
    made = NULL;
}

PUBLIC int cloudfs_shim_state(void) { return state; }

/* The release of libfuse whose headers these are, as FUSE_MAKE_VERSION has it. */
PUBLIC int cloudfs_shim_release(void) { return FUSE_VERSION; }

/* That of the library in use, once a session was made. */
PUBLIC int cloudfs_shim_running_release(void) { return running_release; }

/* Answer a request, once: with an offset, or with an errno where that is not 0. From any thread. */
PUBLIC int cloudfs_shim_reply(void *request, int64_t offset, int error) {
    if (error)
        return true_reply_err((fuse_req_t)request, error);
    return true_reply_lseek((fuse_req_t)request, (off_t)offset);
}

static void on_lseek(fuse_req_t request, fuse_ino_t inode, off_t offset, int whence, struct fuse_file_info *info) {
    if (handler)
        handler(request, inode, info ? info->fh : 0, offset, whence);
    else
        true_reply_err(request, EIO);
}

/* The library of a caller: a search in its handle reaches what it was linked to, and never this file. */
static void *library_of(void *caller) {
    Dl_info found;
    if (!dladdr(caller, &found) || !found.dli_fname)
        return NULL;
    return dlopen(found.dli_fname, RTLD_LAZY | RTLD_NOLOAD);
}

static int complete(void *library) {
    int (*version)(void) = (int (*)(void))dlsym(library, "fuse_version");
    true_reply_open = (int (*)(fuse_req_t, const struct fuse_file_info *))dlsym(library, "fuse_reply_open");
    true_reply_err = (int (*)(fuse_req_t, int))dlsym(library, "fuse_reply_err");
    true_reply_lseek = (int (*)(fuse_req_t, off_t))dlsym(library, "fuse_reply_lseek");
    true_receive = (int (*)(struct fuse_session *, struct fuse_buf *))dlsym(library, "fuse_session_receive_buf");
    session_fd = (int (*)(struct fuse_session *))dlsym(library, "fuse_session_fd");
    running_release = version ? version() : 0;
    if (!true_reply_open || !true_reply_err || !true_reply_lseek || !true_receive || !session_fd)
        return INCOMPLETE;
    return running_release == FUSE_VERSION ? SERVING : OTHER_RELEASE;
}

/* The operations with lseek among them, in `wide`, where it can be added. */
static const struct fuse_lowlevel_ops *extended(void *library, const struct fuse_lowlevel_ops *given, size_t *size,
                                                struct fuse_lowlevel_ops *wide) {
    state = complete(library);
    if (!handler)
        state = IDLE;
    if (state != SERVING || *size > sizeof *wide)
        return given;
    memset(wide, 0, sizeof *wide);
    memcpy(wide, given, *size);
    *size = sizeof *wide;
    wide->lseek = on_lseek;
    return wide;
}

struct fuse_session *session_new(struct fuse_args *arguments, const struct fuse_lowlevel_ops *given, size_t size,
                                 void *data) {
    struct fuse_lowlevel_ops wide;
    void *library = library_of(__builtin_return_address(0));
    struct fuse_session *(*next)(struct fuse_args *, const struct fuse_lowlevel_ops *, size_t, void *) =
        library ? (struct fuse_session * (*)(struct fuse_args *, const struct fuse_lowlevel_ops *, size_t, void *))
                      dlsym(library, "fuse_session_new")
                : NULL;
    if (!next)
        return NULL;
    given = extended(library, given, &size, &wide);
    return made = next(arguments, given, size, data);
}

struct fuse_session *session_new_versioned(struct fuse_args *arguments, const struct fuse_lowlevel_ops *given,
                                           size_t size, void *version, void *data) {
    struct fuse_lowlevel_ops wide;
    void *library = library_of(__builtin_return_address(0));
    struct fuse_session *(*next)(struct fuse_args *, const struct fuse_lowlevel_ops *, size_t, void *, void *) =
        library
            ? (struct fuse_session * (*)(struct fuse_args *, const struct fuse_lowlevel_ops *, size_t, void *, void *))
                  dlsym(library, "fuse_session_new_versioned")
            : NULL;
    if (!next)
        return NULL;
    given = extended(library, given, &size, &wide);
    return made = next(arguments, given, size, version, data);
}

int reply_open(fuse_req_t request, const struct fuse_file_info *info) {
#if FUSE_VERSION >= FUSE_MAKE_VERSION(3, 12)
    if (state == SERVING && !(info->fh & FLUSHED)) {
        struct fuse_file_info changed = *info;
        changed.noflush = 1;
        return true_reply_open(request, &changed);
    }
#endif
    return true_reply_open ? true_reply_open(request, info) : -ENOSYS;
}

/*
 * Shortcuts. For some open files Python leaves word how their bytes are had by system calls alone, and until when
 * that holds. Whoever asks for them is answered from here, request after request, without the interpreter and its
 * lock; whatever is not plain (a page that is not there, the end of a file, an error) is left to Python as it came.
 */

enum { SHORTCUTS = 64, ROOM = 1 << 20, PAGES = 257, VECTOR_BYTES = 32 << 10, LENT_BYTES = 16 << 10 };
enum { WRITABLE = 1, NOWAIT = 2, TELLS_HOLES = 4 };
enum { READY, SERVED, BUSY, USED, COUNTS };

static const int64_t TURN = 2000000; /* ns after which trio's other tasks have their turn */

struct shortcut {
    uint64_t handle;  /* 0: none */
    uint64_t base;    /* offset 0 of the file is this offset of the descriptor */
    uint64_t size;    /* of the file */
    uint64_t mapping; /* address of a mapping of the descriptor's file, from 0 to `mapped` */
    uint64_t mapped;
    int64_t until; /* ns of CLOCK_MONOTONIC */
    int32_t descriptor;
    int32_t pagemap; /* of a process: every page has to be present; -1: of a file */
    int32_t pid;     /* for process_vm_readv; 0: none */
    int32_t pidfd;
    int32_t flags;
};

static struct shortcut shortcuts[SHORTCUTS];
static int64_t spin;
static void (*counter)(void);
static unsigned page_shift;
static char room[ROOM] __attribute__((aligned(4096)));

/*
 * Shared with Python. READY: the next receive() will hardly come back empty. SERVED: requests answered here. BUSY: one
 * is being. USED: bit n: shortcut n was used since Python last looked at its COUNTS: reads, bytes, writes, bytes.
 */
PUBLIC volatile uint64_t cloudfs_shim_words[COUNTS + 4 * SHORTCUTS];

/* CPython's, in the program that loaded this: the interpreter lock is not held while requests are answered here. */
extern void *PyEval_SaveThread(void) __attribute__((weak));
extern void PyEval_RestoreThread(void *) __attribute__((weak));

/*
 * Called when the session is mounted. From now on receive() does not wait, but polls for `nanoseconds` after each
 * request, and calls `given` when it has used any shortcut. 0 where that cannot be.
 */
PUBLIC int cloudfs_shim_hasten(int64_t nanoseconds, void (*given)(void)) {
    hasty = state == SERVING && PyEval_SaveThread && PyEval_RestoreThread && made &&
            fcntl(session_fd(made), F_SETFL, O_RDWR | O_NONBLOCK) == 0;
    spin = nanoseconds;
    counter = given;
    page_shift = (unsigned)__builtin_ctzl((unsigned long)sysconf(_SC_PAGESIZE));
    memset(shortcuts, 0, sizeof shortcuts);
    memset((void *)cloudfs_shim_words, 0, sizeof cloudfs_shim_words);
    return hasty;
}

/* Put a shortcut in its place, the handle modulo SHORTCUTS: who had that one before goes without. */
PUBLIC void cloudfs_shim_set(const struct shortcut *given) { shortcuts[given->handle % SHORTCUTS] = *given; }

static int64_t now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * INT64_C(1000000000) + time.tv_nsec;
}

/* Whether all pages of a piece are present, so that reading it neither waits nor gives the process a page. */
static int present(const struct shortcut *way, uint64_t address, size_t size) {
    uint64_t entries[PAGES], first = address >> page_shift, count = ((address + size - 1) >> page_shift) - first + 1;
    ssize_t length = (ssize_t)(count * sizeof *entries);
    if (count > PAGES || pread(way->pagemap, entries, (size_t)length, (off_t)(first * sizeof *entries)) != length)
        return 0;
    for (uint64_t i = 0; i < count; i++)
        if (!(entries[i] >> 63))
            return 0;
    return 1;
}

/* Whether the PID still means the process whose pagemap is open, and that one still has the same address space. */
static int same(const struct shortcut *way) {
    uint64_t entry;
    return pread(way->pagemap, &entry, sizeof entry, 0) == sizeof entry &&
           (syscall(SYS_pidfd_send_signal, way->pidfd, 0, NULL, 0) == 0 || errno == EPERM);
}

/* All of a piece into `room`, or 0. */
static int fetch(const struct shortcut *way, uint64_t address, size_t size) {
    struct iovec here = {room, size}, there = {(void *)(uintptr_t)address, size};
    if (way->pagemap >= 0 && !present(way, address, size))
        return 0;
    if (way->pid && size > VECTOR_BYTES)
        return syscall(SYS_process_vm_readv, way->pid, &here, 1, &there, 1, 0) == (long)size && same(way);
    return preadv2(way->descriptor, &here, 1, (off_t)address, way->flags & NOWAIT ? RWF_NOWAIT : 0) == (ssize_t)size;
}

/*
 * Whether a file has every page of a piece of its mapping in memory: what is a hole would get a page by being read
 * there. That of a guest is full of holes; a page of one costs 0.02 us to ask for, to copy it twice instead 0.3.
 */
static int held(const struct shortcut *way, uint64_t address, size_t size, const struct stat *file) {
    unsigned char pages[PAGES];
    uint64_t first = address >> page_shift << page_shift, count = ((address + size - 1) >> page_shift) -
                                                                 (address >> page_shift) + 1;
    if (file->st_blocks * 512 >= file->st_size)
        return 1;
    if (!(way->flags & TELLS_HOLES) || count > PAGES ||
        mincore((char *)(uintptr_t)way->mapping + first, count << page_shift, pages))
        return 0;
    for (uint64_t i = 0; i < count; i++)
        if (!(pages[i] & 1))
            return 0;
    return 1;
}

/*
 * Where all of a piece stands, or NULL: in the mapping, where it is long, or in `room`. A file may be cut at any
 * moment: of its mapping the kernel answers EFAULT, and who asked gets EIO.
 */
static const void *find(const struct shortcut *way, uint64_t address, size_t size) {
    struct stat file;
    if (size >= LENT_BYTES && address + size <= way->mapped && fstat(way->descriptor, &file) == 0 &&
        address + size <= (uint64_t)file.st_size && held(way, address, size, &file))
        return (const char *)(uintptr_t)way->mapping + address;
    return fetch(way, address, size) ? room : NULL;
}

/* All of a piece of a file, which never grows, or 0. */
static int store(const struct shortcut *way, uint64_t address, const void *data, size_t size) {
    off_t end = lseek(way->descriptor, 0, SEEK_END);
    return end >= 0 && address + size <= (uint64_t)end &&
           pwrite(way->descriptor, data, size, (off_t)address) == (ssize_t)size;
}

static void reply(int device, uint64_t unique, const void *data, size_t size) {
    struct fuse_out_header head = {(uint32_t)(sizeof head + size), 0, unique};
    struct iovec parts[] = {{&head, sizeof head}, {(void *)data, size}};
    /* ENOENT: whoever asked is gone. Of a connection that is gone the next receive() tells. */
    if (writev(device, parts, 2) < 0)
        return;
}

/* The shortcut for a request, or NULL. The beginnings of fuse_read_in and fuse_write_in are alike. */
static struct shortcut *way_of(const struct fuse_buf *buffer) {
    const struct fuse_in_header *head = buffer->mem;
    const struct fuse_read_in *in = (const void *)(head + 1);
    struct shortcut *way;
    if (buffer->flags & FUSE_BUF_IS_FD || buffer->size < sizeof *head + sizeof *in)
        return NULL;
    if (head->opcode != FUSE_READ && head->opcode != FUSE_WRITE)
        return NULL;
    way = &shortcuts[in->fh % SHORTCUTS];
    return way->handle && way->handle == in->fh ? way : NULL;
}

/* Answer a request of that shortcut, or leave it alone and give 0. */
static int serve(int device, const struct shortcut *way, const struct fuse_buf *buffer) {
    const struct fuse_in_header *head = buffer->mem;
    const struct fuse_read_in *in = (const void *)(head + 1);
    volatile uint64_t *counts = cloudfs_shim_words + COUNTS + 4 * (way - shortcuts);
    uint64_t address = way->base + in->offset;
    if (!in->size || in->size > ROOM || in->offset > way->size || in->size > way->size - in->offset)
        return 0;
    if (address + in->size < address)
        return 0;
    if (head->opcode == FUSE_READ) {
        const void *data = find(way, address, in->size);
        if (!data)
            return 0;
        reply(device, head->unique, data, in->size);
    } else {
        const struct fuse_write_in *written = (const void *)in;
        struct fuse_write_out out = {written->size, 0};
        if (!(way->flags & WRITABLE) || buffer->size - sizeof *head - sizeof *written != written->size ||
            !store(way, address, written + 1, written->size))
            return 0;
        reply(device, head->unique, &out, sizeof out);
        counts += 2;
    }
    counts[0]++;
    counts[1] += in->size;
    cloudfs_shim_words[USED] |= UINT64_C(1) << (way - shortcuts);
    return 1;
}

static int receive_within(struct fuse_session *session, struct fuse_buf *buffer, int64_t limit) {
    int result;
    do
        result = true_receive(session, buffer);
    while (result == -EAGAIN && now() < limit);
    return result;
}

/* Answer requests until one comes that is Python's, none comes, or others have their turn. */
static int serve_all(struct fuse_session *session, struct fuse_buf *buffer, int result) {
    int64_t moment = now(), turn = moment + TURN;
    int device = session_fd(session);
    for (;;) {
        struct shortcut *way = result > 0 ? way_of(buffer) : NULL;
        if (result == -EAGAIN && spin)
            way = (result = receive_within(session, buffer, moment + spin)) > 0 ? way_of(buffer) : NULL;
        if (!way || now() >= way->until)
            return result;
        cloudfs_shim_words[BUSY] = 1;
        int served = serve(device, way, buffer);
        cloudfs_shim_words[BUSY] = 0;
        if (!served)
            return result;
        cloudfs_shim_words[SERVED]++;
        moment = now();
        if (moment >= turn)
            return -EAGAIN;
        result = true_receive(session, buffer);
    }
}

int receive(struct fuse_session *session, struct fuse_buf *buffer) {
    int result;
    if (!hasty)
        return true_receive ? true_receive(session, buffer) : -ENOSYS;
    result = true_receive(session, buffer);
    if (result == -EAGAIN ? spin != 0 : result > 0 && way_of(buffer)) {
        void *thread = PyEval_SaveThread();
        result = serve_all(session, buffer, result);
        PyEval_RestoreThread(thread);
        if (cloudfs_shim_words[USED])
            counter();
    }
    cloudfs_shim_words[READY] = result != -EAGAIN;
    return result == -EAGAIN ? -EINTR : result;
}
