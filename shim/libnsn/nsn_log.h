/* The interest log of one application ID: every change of interest, appended by nsnd, read by every session.
 *
 * A file log.<generation> in the application's directory, on tmpfs, and a word in shared memory (the head), which says which
 * generation is the one and how many bytes of entries are committed. Both outlive nsnd. Entries are written behind the
 * committed end and committed, singly or as a batch, by one release store to the head. When the file is full or mostly dead
 * entries, nsnd writes a snapshot of what is alive into log.<generation + 1>, and commits that by one store too; then it
 * removes the old file. A reader that finds another generation in the head starts over from that file. An nsnd carries on the
 * file that the head names, and removes all others: the nsnd before it died before or behind that store.
 *
 * The file is written and read by system calls, at the moment that interest changes, and mapped by nobody: a file that somebody
 * has cut, or that finds no room, is an error in words and not SIGBUS. nsnd finds such a file at its next change, and goes over
 * to a new one.
 *
 * The interest number counts the changes there ever were: base + the entries of the file. A snapshot ends at the number that
 * the old file had reached: its base is that number less the subscriptions alive, and since each of these was a change once, it
 * is never below zero, and the number never goes backwards over a move.
 *
 * Memory follows what is written. Each subscription alive has room for the entry that will remove it allocated from the start,
 * so that on a full file system adding fails (-ENOSPC) and removing does not.
 */
#ifndef NSN_LOG_H
#define NSN_LOG_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "nsn_route.h"

#define NSN_LOG_MAGIC 0x31676f6c736e736eull
#define NSN_LOG_VERSION 2
#define NSN_LOG_COMMITTED_BITS 36         /* of the head: bytes of entries; above them the generation. 0: there is no log */
#define NSN_LOG_SUBSCRIPTIONS_MAX 4000000 /* alive at once, of one application ID */
#define NSN_LOG_HEADER_SIZE 64            /* entries begin here */
#define NSN_LOG_NOTHING_COMMITTED 0xffffffffu

enum nsn_log_op { NSN_LOG_ADD = 1, NSN_LOG_REMOVE = 2, NSN_LOG_SESSION_GONE = 3 };

struct nsn_log_header {          /* at the front of the file, written once */
    uint64_t magic;
    uint32_t version;
    uint32_t reserved;
    uint64_t generation;
    uint64_t base;               /* interest number of this file's first entry */
    uint8_t padding[32];
};

static inline uint64_t nsn_log_generation(uint64_t head) { return head >> NSN_LOG_COMMITTED_BITS; }
static inline uint64_t nsn_log_committed(uint64_t head) { return head & ((1ull << NSN_LOG_COMMITTED_BITS) - 1); }

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

/* Starts a log in the directory when *head is 0, and carries on the one that it names otherwise. head: a word that the sessions
 * see (nsn_slots_log()), which stays the caller's. initial_size: of the file, 0 for the default (1 MiB; it grows by moving). On
 * failure a negative errno, and words in error. One writer a directory: the caller sees to it. */
int nsn_log_writer_open(struct nsn_log_writer **writer, const char *directory, uint64_t *head, size_t initial_size, char *error,
                        size_t error_size);
void nsn_log_writer_close(struct nsn_log_writer *writer);

/* One change. 0; -EEXIST (the sid is in use: ignored, as NATS does), -ENOENT (unknown sid: ignored), -EINVAL (invalid
 * pattern or too long), -ENOSPC (NSN_LOG_SUBSCRIPTIONS_MAX, or the file system is full), -ENOMEM, or what the file system
 * said when the log had to move. When the file was cut and no other can be made, what the file system said to that:
 * nothing is committed then, and the change is, with the next call that finds room. */
int nsn_log_writer_add(struct nsn_log_writer *writer, struct nsn_target target, const char *pattern, size_t pattern_length,
                       const char *queue, size_t queue_length);
int nsn_log_writer_remove(struct nsn_log_writer *writer, struct nsn_target target);
/* Returns how many subscriptions went. One entry in the log, none when there were no subscriptions. After a failure call
 * again. */
int nsn_log_writer_session_gone(struct nsn_log_writer *writer, uint32_t slot, uint32_t generation);

/* A batch of struct nsn_interest_change (nsn_protocol.h) from one session. Changes are applied in order; those that fail
 * with -EEXIST or -ENOENT are skipped. Any other failure stops: its errno is returned and *failed is its index. A batch
 * that is malformed is -EBADMSG and nothing of it is applied. One commit for all of it; when that fails *failed is
 * NSN_LOG_NOTHING_COMMITTED, and the batch may be applied again. */
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
    const uint64_t *head;
    int fd;                      /* of the file; -1 while there is none */
    uint64_t reached;            /* the head as far as it is applied */
    uint64_t base;               /* interest number of the file's first entry */
    uint64_t count;              /* entries applied; base + count is the interest number reached */
};

/* Opens the log that *head names; nothing is applied yet. On failure a negative errno (-ENOENT: no log), and words in error.
 * The head must stay readable until close. */
int nsn_log_reader_open(struct nsn_log_reader *reader, const char *directory, const uint64_t *head, char *error,
                        size_t error_size);
/* Also of a reader that was never opened, when it is zeroed. */
void nsn_log_reader_close(struct nsn_log_reader *reader);

/* True when something new is in the log: one acquire load, which pairs with the release store that commits. Only between a
 * successful open and close. */
static inline bool nsn_log_reader_behind(const struct nsn_log_reader *reader)
{
    return __atomic_load_n(reader->head, __ATOMIC_ACQUIRE) != reader->reached;
}

/* Applies what is new to routes. 1 when something was, 0 when not, a negative errno when the log cannot be followed (-EPROTO:
 * broken entry, or the file was cut; -ENOENT: the file is not there; -ENOMEM: call again), with words in error. After a move
 * routes were cleared and refilled. */
int nsn_log_reader_replay(struct nsn_log_reader *reader, struct nsn_routes *routes, char *error, size_t error_size);

#endif
