"""kdump: the compressed dump format of makedumpfile, diskdump and QEMU.

`header`: what the first blocks say · `bitmap`: which pages there are · `pages`: where each page lies in the file
`flattened`: the form that goes through pipes, put in order again · `lzo`: the one compression no library here knows

A file is: a header block, a sub header, two bitmaps (pages of RAM; pages that were dumped), one descriptor of 24 bytes
for each dumped page in ascending order, and the pages.

Sources: makedumpfile IMPLEMENTATION and diskdump_mod.h (release 1.7), QEMU dump/dump.c (release 7.2).
"""
