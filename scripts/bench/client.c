/*
 * The measuring half of the benchmarks: small loops around one system call, so that what is measured is the
 * other side. Every command prints one line of JSON; times are nanoseconds of CLOCK_MONOTONIC.
 *
 *     client fill     FILE SIZE SEED PERIOD                  write the pattern below
 *     client hold     SIZE SEED                              a process with that much patterned memory: prints its
 *                                                            address, lives until its standard input ends
 *     client check    FILE START SIZE SEED PERIOD COUNT      COUNT random pieces must show the pattern
 *     client read     FILE START SIZE BLOCK TOTAL            pread(2) in sequence, over and over until TOTAL
 *     client cold     FILE START SIZE BLOCK TOTAL            the same after the file left the page cache
 *     client write    FILE START SIZE BLOCK TOTAL SEED       pwrite(2) in sequence (period 1 MiB)
 *     client pick     FILE START SIZE BLOCK COUNT JOBS       pread(2) at random aligned places, in JOBS processes
 *     client poke     FILE START SIZE BLOCK COUNT SEED       pwrite(2) at random aligned places (period 1 MiB)
 *     client reopen   FILE COUNT                             open(2) + close(2)
 *     client missing  DIRECTORY COUNT                        stat(2) of names that do not exist
 *     client run      COUNT PROGRAM ARGUMENT...              spawn, output to /dev/null, wait
 *
 * The pattern: the 64-bit little-endian word at address a is mix(SEED + (a % PERIOD) / 8), PERIOD 0 for none. So any
 * byte proves where it came from.
 */
#define _GNU_SOURCE

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <sched.h>
#include <signal.h>
#include <spawn.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { MIB = 1 << 20, JOBS_MAX = 64 };

extern char **environ;

struct shared {
	atomic_int ready;
	atomic_int failed;
	uint64_t begin[JOBS_MAX];
	uint64_t end[JOBS_MAX];
};

static void die(const char *doing, const char *what)
{
	fprintf(stderr, "client: cannot %s %s: %s\n", doing, what, strerror(errno));
	exit(1);
}

static uint64_t number(const char *text)
{
	char *stop;
	uint64_t value = strtoull(text, &stop, 0);

	if (*stop) {
		fprintf(stderr, "client: %s is not a number\n", text);
		exit(2);
	}
	return value;
}

static uint64_t now(void)
{
	struct timespec time;

	clock_gettime(CLOCK_MONOTONIC, &time);
	return (uint64_t)time.tv_sec * 1000000000u + (uint64_t)time.tv_nsec;
}

/* SplitMix64 (Steele, Lea, Flood 2014): a bijection of 64-bit numbers, so no two places look alike. */
static uint64_t mix(uint64_t x)
{
	x += 0x9e3779b97f4a7c15u;
	x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
	x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
	return x ^ (x >> 31);
}

static void pattern(uint64_t *words, uint64_t address, size_t size, uint64_t seed, uint64_t period)
{
	for (size_t at = 0; at < size; at += 8)
		words[at / 8] = mix(seed + (period ? (address + at) % period : address + at) / 8);
}

static void *pages(size_t size, int shared)
{
	void *found = mmap(NULL, size, PROT_READ | PROT_WRITE,
			   MAP_ANONYMOUS | MAP_POPULATE | (shared ? MAP_SHARED : MAP_PRIVATE), -1, 0);

	if (found == MAP_FAILED)
		die("allocate", "memory");
	return found;
}

static int open_file(const char *path, int flags)
{
	int fd = open(path, flags | O_CLOEXEC, 0600);

	if (fd < 0)
		die("open", path);
	return fd;
}

static int compare(const void *a, const void *b)
{
	uint64_t left = *(const uint64_t *)a, right = *(const uint64_t *)b;

	return (left > right) - (left < right);
}

static void report(uint64_t *times, uint64_t count, uint64_t bytes, uint64_t wall)
{
	struct rusage self, children;

	getrusage(RUSAGE_SELF, &self);
	getrusage(RUSAGE_CHILDREN, &children);
	qsort(times, count, sizeof *times, compare);
	printf("{\"operations\": %" PRIu64 ", \"bytes\": %" PRIu64 ", \"wall\": %" PRIu64 ", \"cpu\": %" PRIu64
	       ", \"p50\": %" PRIu64 ", \"p90\": %" PRIu64 ", \"p99\": %" PRIu64 "}\n",
	       count, bytes, wall,
	       1000u * (uint64_t)(self.ru_utime.tv_usec + self.ru_stime.tv_usec + children.ru_utime.tv_usec +
				  children.ru_stime.tv_usec) +
		       1000000000u * (uint64_t)(self.ru_utime.tv_sec + self.ru_stime.tv_sec +
						children.ru_utime.tv_sec + children.ru_stime.tv_sec),
	       times[count / 2], times[count * 9 / 10], times[count * 99 / 100]);
}

static int fill(char **word)
{
	int fd = open_file(word[0], O_RDWR | O_CREAT);
	uint64_t size = number(word[1]), seed = number(word[2]), period = number(word[3]);
	uint64_t *buffer = pages(MIB, 0);

	for (uint64_t at = 0; at < size; at += MIB) {
		size_t part = size - at < MIB ? size - at : MIB;

		pattern(buffer, at, part, seed, period);
		if (pwrite(fd, buffer, part, (off_t)at) != (ssize_t)part)
			die("write", word[0]);
	}
	printf("{\"filled\": %" PRIu64 "}\n", size);
	return 0;
}

static int hold(char **word)
{
	uint64_t size = number(word[0]);
	uint64_t *memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_ANONYMOUS | MAP_PRIVATE, -1, 0);
	char byte;

	if (memory == MAP_FAILED)
		die("allocate", "memory");
	madvise(memory, size, MADV_NOHUGEPAGE); /* the same on every host */
	pattern(memory, (uint64_t)(uintptr_t)memory, size, number(word[1]), 0);
	printf("{\"address\": %" PRIu64 "}\n", (uint64_t)(uintptr_t)memory);
	fflush(stdout);
	while (read(0, &byte, 1) > 0)
		;
	return 0;
}

static int check(char **word)
{
	int fd = open_file(word[0], O_RDONLY);
	uint64_t start = number(word[1]), size = number(word[2]), seed = number(word[3]), period = number(word[4]);
	uint64_t count = number(word[5]), random = seed;
	uint64_t *found = pages(MIB, 0), *wanted = pages(MIB, 0);

	for (uint64_t i = 0; i < count; i++) {
		uint64_t most = size < MIB ? size : MIB, address;
		size_t length;

		random = mix(random);
		length = (random >> 8) % (i % 2 ? most : 4096) / 8 * 8 + 8;
		if (length > most)
			length = most;
		random = mix(random);
		address = start + random % (size - length + 1) / 8 * 8;
		pattern(wanted, address, length, seed, period);
		for (size_t done = 0; done < length;) {
			ssize_t got = pread(fd, (char *)found + done, length - done, (off_t)(address + done));

			if (got <= 0)
				die("read", word[0]);
			done += (size_t)got;
		}
		if (memcmp(found, wanted, length)) {
			fprintf(stderr, "client: %s differs within %zu bytes at 0x%" PRIx64 "\n", word[0], length,
				address);
			return 1;
		}
	}
	printf("{\"checked\": %" PRIu64 "}\n", count);
	return 0;
}

static int sequence(char **word, int cold, int writing)
{
	int fd = open_file(word[0], writing ? O_WRONLY : O_RDONLY);
	uint64_t start = number(word[1]), size = number(word[2]), block = number(word[3]);
	uint64_t count = number(word[4]) / block, at = 0, begin;
	uint64_t *times = pages(count * sizeof *times, 0);
	char *buffer = pages(block > MIB ? block : MIB, 0);

	if (writing)
		pattern((uint64_t *)buffer, 0, MIB, number(word[5]), 0);
	if (cold && posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED))
		die("drop the cache of", word[0]);
	begin = now();
	for (uint64_t i = 0, last = begin; i < count; i++) {
		off_t place = (off_t)(start + at);
		ssize_t done = writing ? pwrite(fd, buffer + at % MIB, block, place) : pread(fd, buffer, block, place);
		uint64_t moment = now();

		if (done != (ssize_t)block)
			die(writing ? "write all of a block of" : "read all of a block of", word[0]);
		times[i] = moment - last;
		last = moment;
		at = at + 2 * block <= size ? at + block : 0;
	}
	report(times, count, count * block, now() - begin);
	return 0;
}

static void random_job(char **word, int writing, uint64_t *times, uint64_t count, int job, struct shared *shared,
		       int jobs)
{
	int fd = open_file(word[0], writing ? O_WRONLY : O_RDONLY);
	uint64_t start = number(word[1]), places = number(word[2]) / number(word[3]), block = number(word[3]);
	uint64_t random = mix((uint64_t)job + 1);
	char *buffer = pages(MIB, 0);

	if (writing)
		pattern((uint64_t *)buffer, 0, MIB, number(word[5]), 0);
	atomic_fetch_add(&shared->ready, 1);
	while (atomic_load(&shared->ready) < jobs)
		sched_yield();
	shared->begin[job] = now();
	for (uint64_t i = 0, last = now(); i < count; i++) {
		uint64_t at, moment;
		ssize_t done;

		random = mix(random);
		at = random % places * block;
		done = writing ? pwrite(fd, buffer + at % MIB, block, (off_t)(start + at))
			       : pread(fd, buffer, block, (off_t)(start + at));
		moment = now();
		if (done != (ssize_t)block)
			die(writing ? "write all of a block of" : "read all of a block of", word[0]);
		times[i] = moment - last;
		last = moment;
	}
	shared->end[job] = now();
}

static int scattered(char **word, int writing)
{
	uint64_t count = number(word[4]), begin = UINT64_MAX, end = 0;
	int jobs = writing ? 1 : (int)number(word[5]);
	uint64_t *times = pages(count * (uint64_t)(jobs < JOBS_MAX ? jobs : JOBS_MAX) * sizeof *times, 1);
	struct shared *shared = pages(sizeof *shared, 1);
	int failed = 0;

	if (jobs < 1 || jobs > JOBS_MAX) {
		fprintf(stderr, "client: 1 to %d jobs\n", JOBS_MAX);
		return 2;
	}
	for (int job = 0; job < jobs - 1; job++) {
		pid_t child = fork();

		if (child < 0)
			die("start", "a job");
		if (child == 0) {
			prctl(PR_SET_PDEATHSIG, SIGKILL);
			random_job(word, writing, times + (uint64_t)job * count, count, job, shared, jobs);
			_exit(0);
		}
	}
	random_job(word, writing, times + (uint64_t)(jobs - 1) * count, count, jobs - 1, shared, jobs);
	for (int job = 0, status; job < jobs - 1; job++)
		failed |= wait(&status) < 0 || status != 0;
	if (failed)
		return 1;
	for (int job = 0; job < jobs; job++) {
		begin = shared->begin[job] < begin ? shared->begin[job] : begin;
		end = shared->end[job] > end ? shared->end[job] : end;
	}
	report(times, count * (uint64_t)jobs, count * (uint64_t)jobs * number(word[3]), end - begin);
	return 0;
}

static int reopen(char **word)
{
	uint64_t count = number(word[1]), begin = now();
	uint64_t *times = pages(count * sizeof *times, 0);

	for (uint64_t i = 0, last = begin; i < count; i++) {
		uint64_t moment;

		close(open_file(word[0], O_RDONLY));
		moment = now();
		times[i] = moment - last;
		last = moment;
	}
	report(times, count, 0, now() - begin);
	return 0;
}

static int missing(char **word)
{
	uint64_t count = number(word[1]), begin = now();
	uint64_t *times = pages(count * sizeof *times, 0);
	char path[4096];
	struct stat found;

	for (uint64_t i = 0; i < count; i++) {
		uint64_t last;

		snprintf(path, sizeof path, "%s/no-such-file-%d-%" PRIu64, word[0], (int)getpid(), i);
		last = now();
		if (stat(path, &found) == 0 || errno != ENOENT)
			die("miss", path);
		times[i] = now() - last;
	}
	report(times, count, 0, now() - begin);
	return 0;
}

static int run(char **word)
{
	uint64_t count = number(word[0]), begin = now();
	uint64_t *times = pages(count * sizeof *times, 0);
	posix_spawn_file_actions_t actions;

	posix_spawn_file_actions_init(&actions);
	posix_spawn_file_actions_addopen(&actions, 1, "/dev/null", O_WRONLY, 0);
	for (uint64_t i = 0, last = begin; i < count; i++) {
		uint64_t moment;
		pid_t child;
		int status;

		errno = posix_spawnp(&child, word[1], &actions, NULL, word + 1, environ);
		if (errno || waitpid(child, &status, 0) != child)
			die("run", word[1]);
		if (status != 0) {
			fprintf(stderr, "client: %s failed (status %d)\n", word[1], status);
			return 1;
		}
		moment = now();
		times[i] = moment - last;
		last = moment;
	}
	report(times, count, 0, now() - begin);
	return 0;
}

static int read_blocks(char **word)
{
	return sequence(word, 0, 0);
}

static int cold(char **word)
{
	return sequence(word, 1, 0);
}

static int write_blocks(char **word)
{
	return sequence(word, 0, 1);
}

static int pick(char **word)
{
	return scattered(word, 0);
}

static int poke(char **word)
{
	return scattered(word, 1);
}

int main(int argc, char **argv)
{
	static const struct { const char *name; int least, most; int (*function)(char **); } commands[] = {
		{ "fill", 4, 4, fill }, { "hold", 2, 2, hold }, { "check", 6, 6, check },
		{ "read", 5, 5, read_blocks }, { "cold", 5, 5, cold }, { "write", 6, 6, write_blocks },
		{ "pick", 6, 6, pick }, { "poke", 6, 6, poke }, { "reopen", 2, 2, reopen },
		{ "missing", 2, 2, missing }, { "run", 2, 4096, run },
	};

	prctl(PR_SET_PDEATHSIG, SIGKILL);
	for (size_t i = 0; argc > 1 && i < sizeof commands / sizeof commands[0]; i++)
		if (strcmp(argv[1], commands[i].name) == 0 && argc - 2 >= commands[i].least &&
		    argc - 2 <= commands[i].most)
			return commands[i].function(argv + 2);
	fprintf(stderr, "usage: client COMMAND WORD... (see the head of client.c)\n");
	return 2;
}
