/* Private: memory files as links and pools use them: made, checked before they are mapped, mapped, given back. */
#ifndef NSN_MEMFD_H
#define NSN_MEMFD_H

#include <stddef.h>
#include <stdint.h>

/* A sealable memfd of `size` bytes, mode 0600, close-on-exec. The descriptor or a negative errno with words. */
int nsn_memfd_create(const char *name, uint64_t size, char *error, size_t error_size);
/* Adds seals. 0 or a negative errno with words. */
int nsn_memfd_seal(int fd, int seals, char *error, size_t error_size);
/* Checks what a peer handed over: ordinary memory file, exactly this size, with all `required` seals and none of the
 * `forbidden` ones. 0, or -EPROTO (or the kernel's errno) with words naming `what`. */
int nsn_memfd_check(int fd, const char *what, uint64_t size, int required, int forbidden, char *error, size_t error_size);
/* Maps it shared; neither inherited by fork() nor in core dumps. NULL, errno and words on failure. */
void *nsn_memfd_map(int fd, uint64_t size, int protection, char *error, size_t error_size);

#endif
