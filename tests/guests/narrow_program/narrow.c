/* A program of 32 bits: it says where its text stands, and waits. */
#define _GNU_SOURCE
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

static char text[48];

int main(int count, char **arguments)
{
    char other[300];
    if (count != 3)
        return 1;
    memset(text, '.', sizeof text);
    memcpy(text, "a text of a program of 32 bits", 30);
    char *heap = malloc(48);
    memcpy(heap, text, 48);
    snprintf(other, sizeof other, "%s.new", arguments[2]);
    FILE *file = fopen(other, "w");
    if (!file)
        return 1;
    fprintf(file, "narrow %d %lx %lx\n", (int)getpid(), (unsigned long)(uintptr_t)text, (unsigned long)(uintptr_t)heap);
    fclose(file);
    rename(other, arguments[2]);
    for (;;)
        pause();
}
