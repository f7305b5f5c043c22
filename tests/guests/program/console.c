/* Lines to and from whoever runs the guest, over its serial port. */
#include "guest.h"

#include <fcntl.h>
#include <stdarg.h>
#include <string.h>
#include <termios.h>
#include <unistd.h>

static struct termios for_people;

void console_open(void)
{
    struct termios settings;
    int descriptor = open("/dev/console", O_RDWR | O_NOCTTY);
    if (descriptor < 0)
        return;
    for (int i = 0; i < 3; i++)
        dup2(descriptor, i);
    if (descriptor > 2)
        close(descriptor);
    if (tcgetattr(0, &settings) == 0) {
        for_people = settings;
        console_for_people(0);
    }
}

void console_for_people(int yes)
{
    struct termios settings = for_people;
    if (!yes)
        cfmakeraw(&settings);
    tcsetattr(0, TCSADRAIN, &settings);
}

/* A line that starts so that kernel messages and our own are told apart. */
void say(const char *format, ...)
{
    char line[4096] = "\n@cloudfs ";
    size_t start = strlen(line);
    va_list values;
    va_start(values, format);
    int length = vsnprintf(line + start, sizeof line - start - 1, format, values);
    va_end(values);
    if (length < 0 || (size_t)length > sizeof line - start - 2)
        length = sizeof line - start - 2;
    line[start + length] = '\n';
    for (size_t done = 0; done < start + length + 1;) {
        ssize_t step = write(1, line + done, start + length + 1 - done);
        if (step <= 0)
            return;
        done += step;
    }
}

int hear(char *line, size_t size)
{
    size_t length = 0;
    char byte;
    while (read(0, &byte, 1) == 1) {
        if (byte == '\n' || byte == '\r') {
            if (length == 0)
                continue;
            line[length] = '\0';
            return length;
        }
        if (length + 1 < size)
            line[length++] = byte;
    }
    return -1;
}
