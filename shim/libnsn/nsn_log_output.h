/* The file of the interest log that is being written: entries go into it and are in it once it is finished; what of it counts,
 * the head says. Private to the log's writer. */
#ifndef NSN_LOG_OUTPUT_H
#define NSN_LOG_OUTPUT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "nsn_log.h"

#define NSN_LOG_CHUNK (16u << 10) /* bytes written at once */

struct nsn_log_output {
    uint64_t size;               /* bytes of the file */
    uint64_t generation, base;
    uint64_t written, committed; /* bytes of entries; the second is the writer's */
    uint64_t count;              /* entries written */
    uint64_t allocated;          /* bytes of the file that certainly have memory */
    size_t held;                 /* bytes of the last entries written that are in `chunk` still */
    int failed;                  /* what went wrong when they were to leave it: the file is of no use any more */
    bool nameless;               /* somebody has removed it: it is good for those who have it open, as of the last finish */
    int fd;
    char chunk[NSN_LOG_CHUNK];
};

/* One without a file. NULL: no memory. */
struct nsn_log_output *nsn_log_output_new(uint64_t generation);
void nsn_log_output_free(struct nsn_log_output *output);

/* Makes its file, of its size, empty, with memory for `needed` bytes of entries. 0, or a negative errno. */
int nsn_log_output_create(struct nsn_log_output *output, int directory_fd, const char *name, uint64_t needed);

/* Memory for entries up to `end` (behind the header), so that writing them does not fail on a full file system. 0, or a
 * negative errno. */
int nsn_log_output_allocate(struct nsn_log_output *output, uint64_t end);

/* Behind those that are there. What goes wrong, finish says. */
void nsn_log_output_write(struct nsn_log_output *output, enum nsn_log_op op, struct nsn_target target, const char *pattern,
                          size_t pattern_length, const char *queue, size_t queue_length);

/* Everything written is in the file, which had its whole size still: 0. Otherwise a negative errno, from now on. */
int nsn_log_output_finish(struct nsn_log_output *output);

#endif
