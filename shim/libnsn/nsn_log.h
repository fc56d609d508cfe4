/* The interest log of one application ID: every change of interest, appended by nsnd, read by every session.
 *
 * A file log.<generation> in the application's directory, on tmpfs, mapped read-only by sessions; it outlives nsnd. Entries
 * are written behind the committed end and committed, singly or as a batch, by one release store to `number`. When the file
 * is full or mostly dead entries, nsnd writes a snapshot of what is alive into log.<generation + 1>, then stores
 * NSN_LOG_MOVED into the old file's number, then removes the old file's name. A reader that finds NSN_LOG_MOVED goes on to
 * the next generation, or the highest there is, and starts over from it. An nsnd that finds several files (the one before it
 * died between two of these steps) carries the highest on, and stores NSN_LOG_MOVED into the others.
 *
 * The interest number counts the changes there ever were: base + the entries of the file. A snapshot ends at the number that
 * the old file had reached: its base is that number less the subscriptions alive, and since each of these was a change once,
 * it is never below zero, and the number never goes backwards over a move.
 *
 * Memory follows what is written. Each subscription alive has room for the entry that will remove it allocated from the
 * start, so that on a full file system adding fails (-ENOSPC) and removing does not.
 */
#ifndef NSN_LOG_H
#define NSN_LOG_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "nsn_route.h"

#define NSN_LOG_MAGIC 0x31676f6c736e736eull
#define NSN_LOG_VERSION 1
#define NSN_LOG_MOVED UINT64_MAX
#define NSN_LOG_SUBSCRIPTIONS_MAX 4000000 /* alive at once, of one application ID */
#define NSN_LOG_HEADER_SIZE 4096          /* entries begin here */

enum nsn_log_op { NSN_LOG_ADD = 1, NSN_LOG_REMOVE = 2, NSN_LOG_SESSION_GONE = 3 };

struct nsn_log_header {          /* one page at the front of the file */
    uint64_t magic;
    uint32_t version;
    uint32_t reserved;
    uint64_t generation;
    uint64_t base;               /* interest number of this file's first entry */
    uint64_t size;               /* bytes of the file */
    uint64_t number __attribute__((aligned(64))); /* committed bytes behind the header, or NSN_LOG_MOVED */
    uint64_t count;              /* entries committed, stored before `number`: for information, readers count themselves */
};

struct nsn_log_entry {           /* 24 bytes, 8-byte aligned; pattern and queue follow, then padding */
    uint32_t length;             /* of the whole entry, a multiple of 8 */
    uint8_t op;
    uint8_t reserved;
    uint16_t pattern_length;
    uint16_t queue_length;
    uint16_t reserved2;
    uint32_t slot;
    uint32_t generation;
    uint32_t sid;
};

/* --- nsnd's side ------------------------------------------------------------------------------------------------ */
struct nsn_log_writer;

/* Starts a log in the directory, or carries on the one that is there. initial_size: of the file, 0 for the default
 * (1 MiB; it grows by moving). On failure a negative errno, and words in error. One writer a directory: the caller sees
 * to it. */
int nsn_log_writer_open(struct nsn_log_writer **writer, const char *directory, size_t initial_size, char *error, size_t error_size);
void nsn_log_writer_close(struct nsn_log_writer *writer);

/* One change. 0; -EEXIST (the sid is in use: ignored, as NATS does), -ENOENT (unknown sid: ignored), -EINVAL (invalid
 * pattern or too long), -ENOSPC (NSN_LOG_SUBSCRIPTIONS_MAX, or the file system is full), -ENOMEM, or what the file system
 * said when the log had to move. */
int nsn_log_writer_add(struct nsn_log_writer *writer, struct nsn_target target, const char *pattern, size_t pattern_length,
                       const char *queue, size_t queue_length);
int nsn_log_writer_remove(struct nsn_log_writer *writer, struct nsn_target target);
/* Returns how many subscriptions went. One entry in the log, none when there were no subscriptions. */
int nsn_log_writer_session_gone(struct nsn_log_writer *writer, uint32_t slot, uint32_t generation);

/* A batch of struct nsn_interest_change (nsn_protocol.h) from one session. Changes are applied in order; those that fail
 * with -EEXIST or -ENOENT are skipped. Any other failure stops: its errno is returned and *failed is its index. A batch
 * that is malformed is -EBADMSG and nothing of it is applied. One commit for all of it. */
int nsn_log_writer_apply(struct nsn_log_writer *writer, uint32_t slot, uint32_t generation, const uint8_t *batch, size_t length,
                         uint32_t count, uint32_t *failed);

uint64_t nsn_log_writer_number(const struct nsn_log_writer *writer);           /* base + count */
size_t nsn_log_writer_count(const struct nsn_log_writer *writer);              /* alive, all sessions */
size_t nsn_log_writer_session_count(const struct nsn_log_writer *writer, uint32_t slot, uint32_t generation);
/* Calls back for each live subscription; stops when the callback returns non-zero. */
typedef int (*nsn_log_visit)(void *context, struct nsn_target target, const char *pattern, size_t pattern_length,
                             const char *queue, size_t queue_length);
int nsn_log_writer_visit(const struct nsn_log_writer *writer, nsn_log_visit visit, void *context);

/* --- a session's side ------------------------------------------------------------------------------------------- */
struct nsn_log_reader {
    char directory[256];
    const struct nsn_log_header *header; /* the mapped file; NULL before the first open */
    size_t mapped;
    uint64_t generation;
    uint64_t base;               /* interest number of the file's first entry */
    uint64_t applied;            /* bytes applied; compare with header->number by an acquire load */
    uint64_t count;              /* entries applied; base + count is the interest number reached */
};

/* Opens the log; nothing is applied yet. On failure a negative errno (-ENOENT: no log), and words in error. */
int nsn_log_reader_open(struct nsn_log_reader *reader, const char *directory, char *error, size_t error_size);
void nsn_log_reader_close(struct nsn_log_reader *reader);

/* True when something new is in the log: one acquire load, which pairs with the release store that commits. Only between a
 * successful open and close. */
static inline bool nsn_log_reader_behind(const struct nsn_log_reader *reader)
{
    return __atomic_load_n(&reader->header->number, __ATOMIC_ACQUIRE) != reader->applied;
}

/* Applies what is new to routes. 1 when something was, 0 when not, a negative errno when the log cannot be followed
 * (-EPROTO: broken entry; -ENOENT: moved, and the next file is not there; -ENOMEM: call again), with words in error. After a
 * move routes were cleared and refilled. */
int nsn_log_reader_replay(struct nsn_log_reader *reader, struct nsn_routes *routes, char *error, size_t error_size);

#endif
