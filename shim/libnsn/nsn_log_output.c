/* The file of the interest log that is being written. */
#include "nsn_log_output.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "nsn_log_file.h"
#include "nsn_shared.h"

#define ALLOCATE_STEP (1u << 16) /* bytes of tmpfs taken at once */
#define FILE_MODE 0644           /* whom the directory lets in may read */

struct nsn_log_output *nsn_log_output_new(uint64_t generation)
{
    struct nsn_log_output *output = calloc(1, sizeof *output);
    if (!output)
        return NULL;
    output->generation = generation;
    output->fd = -1;
    return output;
}

void nsn_log_output_free(struct nsn_log_output *output)
{
    if (!output)
        return;
    if (output->fd >= 0)
        close(output->fd);
    free(output);
}

int nsn_log_output_allocate(struct nsn_log_output *output, uint64_t end)
{
    uint64_t wanted = NSN_LOG_HEADER_SIZE + end;
    if (wanted <= output->allocated)
        return 0;
    uint64_t rounded = nsn_round_up(wanted, ALLOCATE_STEP);
    if (rounded > output->size)
        rounded = output->size;
    while (fallocate(output->fd, FALLOC_FL_KEEP_SIZE, (off_t)output->allocated, (off_t)(rounded - output->allocated)))
        if (errno != EINTR)
            return -errno;
    output->allocated = rounded;
    return 0;
}

static int write_whole(int fd, const char *bytes, size_t length, uint64_t at)
{
    while (length) {
        ssize_t written = pwrite(fd, bytes, length, (off_t)at);
        if (written < 0 && errno != EINTR)
            return -errno;
        if (written > 0)
            bytes += written, at += (uint64_t)written, length -= (size_t)written;
    }
    nsn_debug_store();
    return 0;
}

/* Somebody may have cut it: what is written into it now would be read by nobody, and would make it look whole again. */
static int check_whole(struct nsn_log_output *output)
{
    struct stat status;
    if (fstat(output->fd, &status))
        return -errno;
    output->nameless = status.st_nlink == 0;
    return (uint64_t)status.st_size == output->size ? 0 : -EIO;
}

static void write_held(struct nsn_log_output *output)
{
    if (!output->failed && output->held)
        output->failed = check_whole(output);
    if (!output->failed && output->held)
        output->failed = write_whole(output->fd, output->chunk, output->held,
                                     NSN_LOG_HEADER_SIZE + output->written - output->held);
    output->held = 0;
}

void nsn_log_output_write(struct nsn_log_output *output, enum nsn_log_op op, struct nsn_target target, const char *pattern,
                          size_t pattern_length, const char *queue, size_t queue_length)
{
    struct nsn_log_entry entry = {nsn_log_entry_length(pattern_length, queue_length), (uint8_t)op, 0, (uint16_t)pattern_length,
                                  (uint16_t)queue_length, 0, target.slot, target.generation, target.sid};
    if (output->held + entry.length > NSN_LOG_CHUNK)
        write_held(output);
    char *at = output->chunk + output->held;
    memset(at + entry.length - 8, 0, 8); /* the padding */
    memcpy(at, &entry, sizeof entry);
    if (pattern_length)
        memcpy(at + sizeof entry, pattern, pattern_length);
    if (queue_length)
        memcpy(at + sizeof entry + pattern_length, queue, queue_length);
    output->held += entry.length;
    output->written += entry.length;
    output->count++;
}

int nsn_log_output_finish(struct nsn_log_output *output)
{
    write_held(output);
    return output->failed;
}

int nsn_log_output_create(struct nsn_log_output *output, int directory_fd, const char *name, uint64_t needed)
{
    unlinkat(directory_fd, name, 0);
    output->fd = openat(directory_fd, name, O_RDWR | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, FILE_MODE);
    if (output->fd < 0)
        return -errno;
    int result = fchmod(output->fd, FILE_MODE) || ftruncate(output->fd, (off_t)output->size) ? -errno : 0;
    if (!result)
        result = nsn_log_output_allocate(output, needed);
    struct nsn_log_header header = {.magic = NSN_LOG_MAGIC, .version = NSN_LOG_VERSION, .generation = output->generation,
                                    .base = output->base};
    return result ? result : write_whole(output->fd, (const char *)&header, sizeof header, 0);
}
