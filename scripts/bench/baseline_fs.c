/*
 * The yardstick of mount.py: what a file system of this kind can be, written in C.
 *
 * A low-level libfuse 3 file system, one thread, one `fuse_session_loop`, no cache and no lock. It serves
 *
 *     direct    a mapped file, direct I/O
 *     cached    the same file through the page cache, kept over open and close
 *     memory    another file (/proc/PID/mem) by one pread(2) per request, direct I/O, size 0
 *     remote    the memory of a process by one process_vm_readv(2) per request, direct I/O, size 0
 *     many/     a directory of empty files, listed with their attributes (READDIRPLUS)
 *
 * Replies are sent from the mapping itself; nothing is spliced (slower than the copy for tmpfs).
 *
 *     baseline_fs [--file PATH] [--memory PATH] [--remote PID] [--entries COUNT] MOUNTPOINT
 *
 * It stays in the foreground and unmounts on SIGTERM and SIGINT.
 */
#define FUSE_USE_VERSION 34
#define _GNU_SOURCE

#include <errno.h>
#include <fcntl.h>
#include <fuse_lowlevel.h>
#include <getopt.h>
#include <inttypes.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

enum { DIRECT = 2, CACHED = 3, MEMORY = 4, MANY = 5, REMOTE = 6, FIRST_ENTRY = 100 };

/* Entries and attributes hold for this long: a file system that is asked no needless question. */
static const double TIMEOUT = 300.0;

/* libfuse 3 negotiates at most 256 pages for one request (FUSE_MAX_MAX_PAGES in its fuse_i.h). */
static const size_t REQUEST_MAX = 256 * 4096;

static uint8_t *mapping;
static size_t mapping_size;
static int memory_fd = -1;
static pid_t remote_pid;
static uint8_t *buffer; /* one request at a time: it is never shared */
static uint64_t entry_count;
static struct timespec started;

static int attributes(fuse_ino_t inode, struct stat *out)
{
	memset(out, 0, sizeof *out);
	out->st_ino = inode;
	out->st_nlink = 1;
	out->st_uid = getuid();
	out->st_gid = getgid();
	out->st_atim = out->st_mtim = out->st_ctim = started;
	out->st_blksize = 4096;
	if (inode == FUSE_ROOT_ID || inode == MANY) {
		out->st_mode = S_IFDIR | 0555;
	} else if (inode == DIRECT || inode == CACHED) {
		out->st_mode = S_IFREG | 0600;
		out->st_size = (off_t)mapping_size;
		out->st_blocks = (blkcnt_t)((mapping_size + 511) / 512);
	} else if (inode == MEMORY || inode == REMOTE) {
		out->st_mode = S_IFREG | 0600;
	} else if (inode >= FIRST_ENTRY && inode - FIRST_ENTRY < entry_count) {
		out->st_mode = S_IFREG | 0444;
	} else {
		return ENOENT;
	}
	return 0;
}

/* Entry number `index` of a directory, "." and ".." being 0 and 1; 0 behind the last one. */
static fuse_ino_t entry_at(fuse_ino_t directory, uint64_t index, char name[32])
{
	static const struct { const char *name; fuse_ino_t inode; } top[] = {
		{ "direct", DIRECT }, { "cached", CACHED }, { "memory", MEMORY }, { "many", MANY },
		{ "remote", REMOTE },
	};

	if (index < 2) {
		strcpy(name, index ? ".." : ".");
		return index ? FUSE_ROOT_ID : directory;
	}
	index -= 2;
	if (directory == FUSE_ROOT_ID && index < sizeof top / sizeof top[0]) {
		strcpy(name, top[index].name);
		return top[index].inode;
	}
	if (directory == MANY && index < entry_count) {
		snprintf(name, 32, "file-%06" PRIu64, index);
		return FIRST_ENTRY + index;
	}
	return 0;
}

static fuse_ino_t inode_of(fuse_ino_t directory, const char *wanted)
{
	char name[32];

	if (directory == MANY) {
		char *stop;
		uint64_t index;

		if (strncmp(wanted, "file-", 5) != 0)
			return 0;
		index = strtoull(wanted + 5, &stop, 10);
		if (*stop || index >= entry_count)
			return 0;
		snprintf(name, sizeof name, "file-%06" PRIu64, index);
		return strcmp(name, wanted) == 0 ? FIRST_ENTRY + index : 0;
	}
	for (uint64_t index = 2;; index++) {
		fuse_ino_t inode = entry_at(directory, index, name);

		if (!inode || strcmp(name, wanted) == 0)
			return inode;
	}
}

static void on_init(void *userdata, struct fuse_conn_info *connection)
{
	(void)userdata;
	/* Every listing brings the attributes along: `ls -l` then asks for nothing more. */
	connection->want &= ~(unsigned)FUSE_CAP_READDIRPLUS_AUTO;
}

static void on_lookup(fuse_req_t request, fuse_ino_t parent, const char *name)
{
	struct fuse_entry_param entry = { .attr_timeout = TIMEOUT, .entry_timeout = TIMEOUT };

	entry.ino = inode_of(parent, name);
	if (!entry.ino || attributes(entry.ino, &entry.attr))
		fuse_reply_err(request, ENOENT);
	else
		fuse_reply_entry(request, &entry);
}

static void on_getattr(fuse_req_t request, fuse_ino_t inode, struct fuse_file_info *file)
{
	struct stat found;
	int error = attributes(inode, &found);

	(void)file;
	if (error)
		fuse_reply_err(request, error);
	else
		fuse_reply_attr(request, &found, TIMEOUT);
}

static void on_setattr(fuse_req_t request, fuse_ino_t inode, struct stat *wanted, int what, struct fuse_file_info *file)
{
	(void)wanted;
	if (what & FUSE_SET_ATTR_SIZE)
		fuse_reply_err(request, EPERM);
	else
		on_getattr(request, inode, file);
}

static void on_open(fuse_req_t request, fuse_ino_t inode, struct fuse_file_info *file)
{
	if ((inode == MEMORY && memory_fd < 0) || (inode == REMOTE && !remote_pid)) {
		fuse_reply_err(request, ENODEV);
		return;
	}
	file->direct_io = inode != CACHED;
	file->keep_cache = inode == CACHED;
	fuse_reply_open(request, file);
}

static void on_read(fuse_req_t request, fuse_ino_t inode, size_t size, off_t offset, struct fuse_file_info *file)
{
	(void)file;
	if (inode == MEMORY || inode == REMOTE) {
		size_t wanted = size < REQUEST_MAX ? size : REQUEST_MAX;
		struct iovec here = { buffer, wanted }, there = { (void *)(uintptr_t)offset, wanted };
		ssize_t count = inode == MEMORY ? pread(memory_fd, buffer, wanted, offset)
						: process_vm_readv(remote_pid, &here, 1, &there, 1, 0);

		if (count < 0)
			fuse_reply_err(request, errno == EFAULT ? EIO : errno);
		else
			fuse_reply_buf(request, (const char *)buffer, (size_t)count);
	} else if ((inode != DIRECT && inode != CACHED) || offset < 0 || (size_t)offset >= mapping_size) {
		fuse_reply_buf(request, NULL, 0);
	} else {
		size_t left = mapping_size - (size_t)offset;

		fuse_reply_buf(request, (const char *)mapping + offset, size < left ? size : left);
	}
}

static void on_write(fuse_req_t request, fuse_ino_t inode, const char *data, size_t size, off_t offset,
		     struct fuse_file_info *file)
{
	(void)file;
	if (inode == MEMORY) {
		ssize_t count = pwrite(memory_fd, data, size, offset);

		if (count < 0)
			fuse_reply_err(request, errno);
		else
			fuse_reply_write(request, (size_t)count);
	} else if ((inode != DIRECT && inode != CACHED) || offset < 0 || (size_t)offset >= mapping_size) {
		fuse_reply_err(request, EINVAL);
	} else {
		size_t left = mapping_size - (size_t)offset;

		if (size > left)
			size = left;
		memcpy(mapping + offset, data, size);
		fuse_reply_write(request, size);
	}
}

static void list(fuse_req_t request, fuse_ino_t directory, size_t size, off_t offset, int plus)
{
	char *listing = malloc(size);
	size_t used = 0;

	if (!listing) {
		fuse_reply_err(request, ENOMEM);
		return;
	}
	for (uint64_t index = (uint64_t)offset;; index++) {
		struct fuse_entry_param entry = { .attr_timeout = TIMEOUT, .entry_timeout = TIMEOUT };
		char name[32];
		size_t needed;

		entry.ino = entry_at(directory, index, name);
		if (!entry.ino || attributes(entry.ino, &entry.attr))
			break;
		if (plus)
			needed = fuse_add_direntry_plus(request, listing + used, size - used, name, &entry,
							(off_t)(index + 1));
		else
			needed = fuse_add_direntry(request, listing + used, size - used, name, &entry.attr,
						   (off_t)(index + 1));
		if (needed > size - used)
			break;
		used += needed;
	}
	fuse_reply_buf(request, listing, used);
	free(listing);
}

static void on_readdir(fuse_req_t request, fuse_ino_t inode, size_t size, off_t offset, struct fuse_file_info *file)
{
	(void)file;
	list(request, inode, size, offset, 0);
}

static void on_readdirplus(fuse_req_t request, fuse_ino_t inode, size_t size, off_t offset,
			   struct fuse_file_info *file)
{
	(void)file;
	list(request, inode, size, offset, 1);
}

static const struct fuse_lowlevel_ops operations = {
	.init = on_init,
	.lookup = on_lookup,
	.getattr = on_getattr,
	.setattr = on_setattr,
	.open = on_open,
	.read = on_read,
	.write = on_write,
	.readdir = on_readdir,
	.readdirplus = on_readdirplus,
};

static int map_file(const char *path)
{
	struct stat found;
	int fd = open(path, O_RDWR | O_CLOEXEC);

	if (fd < 0 || fstat(fd, &found) < 0) {
		fprintf(stderr, "baseline_fs: cannot open %s: %s\n", path, strerror(errno));
		return -1;
	}
	mapping_size = (size_t)found.st_size;
	mapping = mmap(NULL, mapping_size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	close(fd);
	if (mapping == MAP_FAILED) {
		fprintf(stderr, "baseline_fs: cannot map %s: %s\n", path, strerror(errno));
		return -1;
	}
	return 0;
}

static int open_memory(const char *path)
{
	memory_fd = open(path, O_RDWR | O_CLOEXEC);
	if (memory_fd < 0) {
		fprintf(stderr, "baseline_fs: cannot open %s: %s\n", path, strerror(errno));
		return -1;
	}
	return 0;
}

static int serve(const char *mountpoint)
{
	char *words[] = { "baseline_fs", "-o", "fsname=baseline_fs,default_permissions", NULL };
	struct fuse_args arguments = FUSE_ARGS_INIT(3, words);
	struct fuse_session *session = fuse_session_new(&arguments, &operations, sizeof operations, NULL);
	int result = 1;

	if (!session)
		return 1;
	if (fuse_set_signal_handlers(session) == 0) {
		if (fuse_session_mount(session, mountpoint) == 0) {
			result = fuse_session_loop(session) < 0;
			fuse_session_unmount(session);
		}
		fuse_remove_signal_handlers(session);
	}
	fuse_session_destroy(session);
	fuse_opt_free_args(&arguments);
	return result;
}

int main(int argc, char **argv)
{
	static const struct option options[] = {
		{ "file", required_argument, NULL, 'f' },
		{ "memory", required_argument, NULL, 'm' },
		{ "remote", required_argument, NULL, 'r' },
		{ "entries", required_argument, NULL, 'e' },
		{ NULL, 0, NULL, 0 },
	};
	int option;

	prctl(PR_SET_PDEATHSIG, SIGTERM);
	clock_gettime(CLOCK_REALTIME, &started);
	buffer = aligned_alloc(4096, REQUEST_MAX);
	if (!buffer)
		return 1;
	memset(buffer, 1, REQUEST_MAX); /* its pages are there before the first request */
	while ((option = getopt_long(argc, argv, "", options, NULL)) != -1) {
		if (option == 'f' && map_file(optarg) < 0)
			return 1;
		if (option == 'm' && open_memory(optarg) < 0)
			return 1;
		if (option == 'r')
			remote_pid = (pid_t)strtol(optarg, NULL, 10);
		if (option == 'e')
			entry_count = strtoull(optarg, NULL, 0);
		if (option == '?')
			return 2;
	}
	if (optind != argc - 1) {
		fprintf(stderr, "usage: baseline_fs [--file PATH] [--memory PATH] [--remote PID] [--entries COUNT] MOUNTPOINT\n");
		return 2;
	}
	return serve(argv[optind]);
}
