/* A link: one producer session -> one consumer session, in a sealed memfd of its own.
 *
 * Records lie in 64 KiB chunks, never across two. The producer takes the lowest chunk that is free, so the memory touched
 * follows the backlog and the capacity never depends on where the positions stand. A position is logical (chunk number in
 * the link's life * 64 KiB + offset); the file's map says in which physical chunk a logical one lies.
 *
 * File: page 0 is written by the producer (identity, tail, stall and want numbers, the chunk map), the pages behind it by
 * the consumer (head, acknowledgements, one word for each pool reference), then the chunks. The consumer gives the
 * memory of high chunks back before it publishes the position that frees them.
 */
#ifndef NSN_LINK_H
#define NSN_LINK_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define NSN_LINK_MAGIC 0x316b6e6c736e736eull
#define NSN_LINK_VERSION 2
#define NSN_LINK_CHUNK 65536u
#define NSN_LINK_CHUNKS 1408u              /* 64 MiB of backlog and the ends of chunks that no record fitted into */
#define NSN_LINK_LIMIT (64ull << 20)       /* default backlog, bytes, payloads in the pool included */
#define NSN_LINK_REFS 8208u                /* pool references that can be out at once */
#define NSN_LINK_KEEP 16u                  /* chunks from this physical index on are given back when read */
#define NSN_RECORD_MAX 24576u              /* bytes of one record in a link */
#define NSN_RECORD_SIDS 64u                /* subscriptions that one record can be for */
#define NSN_INLINE_MAX 8192u               /* headers + payload up to here are copied into the link, above into the pool */
#define NSN_PART_MAX 21840u                /* bytes of a record that is a part: three fill a chunk */

enum nsn_record_kind {
    NSN_RECORD_MESSAGE = 1,                /* 1 to NSN_RECORD_SIDS sids, a subject of 1 to 4096 bytes, a reply of up to 4096 */
    NSN_RECORD_SEGMENT_GONE = 2,           /* flags NSN_RECORD_POOL, all counts and lengths 0; the ref has only `segment` */
    NSN_RECORD_PART = 3,                   /* the next payload_length bytes of the message before it; other counts are 0 */
};
enum nsn_record_flags {
    NSN_RECORD_POOL = 1,                   /* headers and payload lie in the pool: a struct nsn_pool_ref follows the sids */
    NSN_RECORD_PASSED_ON = 2,              /* another member of a queue group could not take it */
    NSN_RECORD_PARTS = 4,                  /* headers and payload follow in records of kind PART, all made visible at once */
    NSN_RECORD_NO_ECHO = 8,                /* the session that writes it gets nothing of it, also when it is passed on */
};

struct nsn_record { /* then sids (uint32_t each, padded to 8), [pool ref], subject, reply, [headers, payload] */
    uint32_t length;                       /* whole record, a multiple of 8; NSN_RECORD_SKIP: nothing more in this chunk */
    uint8_t kind;
    uint8_t flags;
    uint16_t sid_count;
    uint16_t subject_length;
    uint16_t reply_length;
    uint32_t header_length;
    uint64_t payload_length;
    uint64_t stamp;                        /* nsn_now_ns() of the publish */
};
#define NSN_RECORD_SKIP 0xffffffffu

struct nsn_pool_ref {
    uint32_t segment;                      /* number in the producer's life */
    uint32_t ref;                          /* index of the consumer's word that says "released" */
    uint64_t offset;                       /* in the segment; headers first, then payload */
    uint32_t use;                          /* what the consumer writes into that word; never 0 */
    uint32_t reserved;
};

/* --- producer ---------------------------------------------------------------------------------------------------- */
struct nsn_link_out;
struct nsn_block;                          /* nsn_pool.h */
struct nsn_pool;

/* limit: backlog in bytes, at most NSN_LINK_LIMIT, 0 for it. *fd is the sealed memfd (SHRINK, GROW, SEAL), owned by the
 * caller, who closes it once the consumer has taken the link. Negative errno and words on failure. */
int nsn_link_out_create(struct nsn_link_out **link, uint64_t link_id, uint64_t limit, int *fd, char *error, size_t error_size);
/* Drops every block that is still referenced, and the mapping. The consumer's mapping stays good. Neither this nor
 * nsn_link_in_destroy in a forked child: the mapping is not there, other memory may lie in its place. */
void nsn_link_out_destroy(struct nsn_link_out *link, struct nsn_pool *pool);

/* 1: a record of this length with this many bytes in the pool is admitted (an empty link admits any). 0: full, or as many
 * pool references are out as can be (reap, thoroughly, and ask again). For a message that takes several records, all but the
 * last with NSN_RECORD_SIDS sids: the sums, every record counted as long as the longest. To be called inside the publish
 * that writes, behind its fence: it is also the look at the consumer's trim number. -EPROTO: the consumer's words are
 * impossible; the link must be given up. */
int nsn_link_out_room(struct nsn_link_out *link, uint32_t record_length, uint64_t pool_bytes);

/* The same for `count` records of `length` bytes (at most NSN_PART_MAX) each, without anything in the pool. */
int nsn_link_out_room_for(struct nsn_link_out *link, uint32_t length, uint32_t count);

/* Where to write a record of `length` bytes (multiple of 8, <= NSN_RECORD_MAX); room must have been found just before. */
void *nsn_link_out_reserve(struct nsn_link_out *link, uint32_t length);
/* Makes the reserved record visible: one release store. A record that is not committed is replaced by the next reserve. */
void nsn_link_out_commit(struct nsn_link_out *link);
/* Keeps the reserved record, and makes it visible with the next one that is committed, or by reveal: then all at once. */
void nsn_link_out_append(struct nsn_link_out *link);
void nsn_link_out_reveal(struct nsn_link_out *link);

/* Registers that the reserved record refers to the block (which is held once more): fills ref->ref and ref->use. Between
 * reserve and commit, for a record that will be committed; `bytes` are its header_length + payload_length, more than 0, and
 * room must have been found for them. */
void nsn_link_out_refer(struct nsn_link_out *link, struct nsn_block *block, uint64_t bytes, struct nsn_pool_ref *ref);
/* Drops the blocks that the consumer has released, in whatever order. thorough: looks at all that are out, else at the
 * oldest few. Returns how many. */
size_t nsn_link_out_reap(struct nsn_link_out *link, struct nsn_pool *pool, bool thorough);

uint64_t nsn_link_out_behind(struct nsn_link_out *link);        /* backlog: bytes not consumed, pool payloads included */
uint64_t nsn_link_out_pinned(const struct nsn_link_out *link);  /* pool bytes referenced and not released */
/* Bytes of memory the link occupies at most, as far as known. Also lets go of page tables for what the consumer gave back: to
 * be called once for a link that has become idle, about a second after the consumer's trim. */
uint64_t nsn_link_out_touched(struct nsn_link_out *link);
bool nsn_link_out_taken(const struct nsn_link_out *link);       /* the consumer has mapped it */
bool nsn_link_out_taken_with(const struct nsn_link_out *link, uint64_t segments); /* and so many of the pool's segments */
uint32_t nsn_link_out_tail32(const struct nsn_link_out *link);  /* for the consumer's board: differs after each commit */
uint64_t nsn_link_out_id(const struct nsn_link_out *link);

/* Asks to be rung when there is room: raises the want number (odd), fence (pairs with the one in nsn_link_in_publish),
 * and looks again: 1 when there is room already. unwant ends the asking. */
int nsn_link_out_want(struct nsn_link_out *link, uint32_t record_length, uint64_t pool_bytes);
/* The same for memory, when the link has room but the session's budget is used up: rung when half of what is behind has been
 * read, or some of the pool references that are out (an eighth, at least one) have been released. 1: there is something to
 * reap already, or nothing that could come back. It shares the want number with nsn_link_out_want: the last asking counts. */
int nsn_link_out_want_memory(struct nsn_link_out *link);
void nsn_link_out_unwant(struct nsn_link_out *link);

/* Gives the consumer up as slow (again only when it has acknowledged the last time): everything in the link is to be
 * discarded by it. Until it has acknowledged, stalled() is true and nothing may be written; what the producer does not write
 * meanwhile it reports by drop(). */
void nsn_link_out_stall(struct nsn_link_out *link);
bool nsn_link_out_stalled(struct nsn_link_out *link);
void nsn_link_out_drop(struct nsn_link_out *link, uint64_t messages);

/* When the consumer is dead: a reader on the producer's own mapping, of what was not consumed. Destroyed before the link. */
struct nsn_link_in;
/* Whether this reference, with so many bytes, is out as it was written: then the block has not been used for anything else. */
bool nsn_link_out_refers(const struct nsn_link_out *link, const struct nsn_pool_ref *ref, uint64_t bytes);
int nsn_link_out_reader(struct nsn_link_out *link, struct nsn_link_in **reader, char *error, size_t error_size);

/* --- consumer ---------------------------------------------------------------------------------------------------- */

/* Maps a link that was handed over; checks seals, size, magic, version and identity first. The descriptor stays the
 * caller's. Says "taken". */
int nsn_link_in_map(struct nsn_link_in **link, int fd, uint64_t link_id, char *error, size_t error_size);
void nsn_link_in_destroy(struct nsn_link_in *link);
/* Says that one more of the producer's pool segments has been mapped. */
void nsn_link_in_took_segment(struct nsn_link_in *link);

/* A checked copy of a record's fixed part, and where its variable parts lie. The bytes are the producer's: each may change
 * at any time, so each is copied once and the copy used. */
struct nsn_record_view {
    struct nsn_record record;
    struct nsn_pool_ref pool_ref;          /* when flags & NSN_RECORD_POOL */
    uint32_t sids[NSN_RECORD_SIDS];
    const char *subject;
    const char *reply;
    const uint8_t *headers;                /* NULL when in the pool, or in parts */
    const uint8_t *payload;
};

/* The next record, not yet consumed: 1, 0 when empty, -EPROTO when the producer's words or bytes are impossible. A second
 * peek gives the same record. limit_stamp: records stamped later are not seen (0 is returned). */
int nsn_link_in_peek(struct nsn_link_in *link, struct nsn_record_view *view, uint64_t limit_stamp);
/* Begins to fetch, side by side, the cache lines that the next peek reads one behind another: for when they are known to have
 * changed. */
void nsn_link_in_prefetch(const struct nsn_link_in *link);
/* Stamp of the next record without checking the rest: 1 and *stamp, 0 when empty, -EPROTO. */
int nsn_link_in_stamp(struct nsn_link_in *link, uint64_t *stamp);
/* Behind a peek at a message with NSN_RECORD_PARTS: copies its headers and payload, all of them, to `bytes` (NULL: passes them
 * over). The last part is then the record that was peeked last; the view stays good until the next publish. 1, or -EPROTO when
 * they are not all there, or not what they should be. */
int nsn_link_in_parts(struct nsn_link_in *link, const struct nsn_record_view *view, uint8_t *bytes);
/* Passes the record that was peeked last. Its bytes may be overwritten after the next nsn_link_in_publish. */
void nsn_link_in_consume(struct nsn_link_in *link);
/* Publishes the position (release). 1 when the producer wants to be rung (once for each of its want numbers, when half
 * of the backlog is free or all of it), else 0. Also to be called after releases, for producers that wait for those; without
 * anything new it costs nothing. */
int nsn_link_in_publish(struct nsn_link_in *link);
/* Releases a pool reference of an earlier record, in any order. */
void nsn_link_in_release(struct nsn_link_in *link, uint32_t ref, uint32_t use);

bool nsn_link_in_empty(struct nsn_link_in *link);               /* reads the tail (acquire) */
int nsn_link_in_end(struct nsn_link_in *link, uint64_t *end);   /* the same: up to where there is something. 0, or -EPROTO */
uint64_t nsn_link_in_tail(struct nsn_link_in *link);            /* the producer's position as of now (checked); for barriers */
uint64_t nsn_link_in_head(const struct nsn_link_in *link);      /* own position */
uint64_t nsn_link_in_behind(struct nsn_link_in *link);          /* bytes of link memory between the two */
uint64_t nsn_link_in_id(const struct nsn_link_in *link);

/* Position up to which everything is to be discarded because the producer gave this consumer up, or 0 when it has not.
 * The caller consumes up to there (passing queue messages on), publishes, and then acknowledges; *dropped is how many
 * messages the producer did not write since the last acknowledgement. */
uint64_t nsn_link_in_stalled(struct nsn_link_in *link);
void nsn_link_in_acknowledge_stall(struct nsn_link_in *link, uint64_t *dropped);
/* Messages that were dropped since, by a publish that had begun before the producer knew. */
uint64_t nsn_link_in_late_drops(struct nsn_link_in *link);

/* Gives the memory of free chunks back when the link is empty. Non-blocking: first part raises the trim number, and after
 * a fence (pairs with the one at the start of every publish) the caller must have seen the producer outside a publish
 * before it calls the second part with go = true; with false nothing is given back, nor when the link has been used
 * meanwhile. Meanwhile the producer takes only chunks from NSN_LINK_KEEP on, which are always given back before they are
 * free. begin: false when the link is not empty or has nothing worth giving back. Returns bytes given back. */
bool nsn_link_in_trim_begin(struct nsn_link_in *link);
size_t nsn_link_in_trim_end(struct nsn_link_in *link, bool go);

#endif
