/*
 * What pyfuse3 leaves out of libfuse: FUSE_LSEEK, so that programs skip the holes of a file, and FOPEN_NOFLUSH, so
 * that closing a file is one request and not two.
 *
 * Loaded with RTLD_GLOBAL before pyfuse3, it stands in front of three functions of libfuse. It is linked to nothing:
 * the true ones are looked up in what pyfuse3 itself was linked to. Where that is another release than the headers
 * that this was compiled with, it passes all calls on and adds nothing.
 */
#define _GNU_SOURCE
#define FUSE_USE_VERSION 32
#include <dlfcn.h>
#include <errno.h>
#include <fuse_lowlevel.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define PUBLIC __attribute__((visibility("default")))

typedef void (*seek_handler)(void *request, uint64_t inode, uint64_t handle, int64_t offset, int whence);

enum { IDLE, SERVING, OTHER_RELEASE, INCOMPLETE };

/* Handles with this bit belong to files that want to hear of every close(2). */
static const uint64_t FLUSHED = UINT64_C(1) << 62;

static seek_handler handler;
static int state = IDLE;
static int running_release;
static int (*true_reply_open)(fuse_req_t, const struct fuse_file_info *);
static int (*true_reply_err)(fuse_req_t, int);
static int (*true_reply_lseek)(fuse_req_t, off_t);

/* In newer headers fuse_session_new is a macro or an inline function: hence the labels. */
PUBLIC struct fuse_session *session_new(struct fuse_args *, const struct fuse_lowlevel_ops *, size_t, void *)
    __asm__("fuse_session_new");
PUBLIC struct fuse_session *session_new_versioned(struct fuse_args *, const struct fuse_lowlevel_ops *, size_t,
                                                  void *version, void *) __asm__("fuse_session_new_versioned");
PUBLIC int reply_open(fuse_req_t, const struct fuse_file_info *) __asm__("fuse_reply_open");

/* Called before the session is made; NULL: add nothing. */
PUBLIC void cloudfs_shim_begin(seek_handler given) {
    handler = given;
    state = IDLE;
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
    running_release = version ? version() : 0;
    if (!true_reply_open || !true_reply_err || !true_reply_lseek)
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
    return next(arguments, given, size, data);
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
    return next(arguments, given, size, version, data);
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
