/* The program that runs in test guests: /init, its children and what it tells of itself. */
#ifndef GUEST_H
#define GUEST_H

#define _GNU_SOURCE
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <sys/types.h>

#define PAGEMAP_PRESENT (1ULL << 63)            /* Documentation/admin-guide/mm/pagemap.rst */
#define PAGEMAP_FRAME ((1ULL << 55) - 1)

/* console.c: lines to and from whoever runs the guest. */
void console_open(void);
void console_for_people(int yes);               /* echo, line editing, Ctrl-C; or bytes as they are */
void say(const char *format, ...) __attribute__((format(printf, 1, 2)));
int hear(char *line, size_t size);

/* start.c: the processes of a guest. */
void start_processes(void);
void wait_until_asleep(void);

/* keeper.c: the process that holds the secrets, and in whose address space the guest stops. */
int keeper_main(int command, int answer);
void secret_text(const char *name, char *text);
#define SECRET_SIZE 48

/* truth.c: all that the guest knows of itself, left in its memory for the host to fetch. */
void tell_truth(void);
uint64_t page_frame(int pagemap, uintptr_t address);

void die(const char *what) __attribute__((noreturn));

#endif
