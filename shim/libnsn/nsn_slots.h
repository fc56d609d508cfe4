/* The sessions of one application ID: where they are told apart, and the words each of them shows to the others.
 *
 * Two segments (nsn_segment.h) for an application's directory (<runtime>/<application id>/), where the file `slots` says which.
 * They outlive nsnd for as long as a session has them attached, and with the last of all they are gone:
 *   the table   written by nsnd alone, read by sessions: who holds which slot, and how far the interest log is.
 *   the places  one page a slot, written by the slot's session alone, and a board a slot, of which word p is written by the
 *               session in slot p alone: its way to say "there is something new in my link to you".
 *
 * A session of another user than nsnd's ("other" below) may not write these. Its place lies in a segment of its own
 * (nsn_place.h), which everybody reads: its page, and its board, on which it writes itself: word p is its way to say "there is
 * something new in my link to you" to the session in slot p. So its page among the places is not used; its board there is, for
 * what sessions of nsnd's user have for it.
 *
 * Others may read both segments once one of them has been let in, while the node is shared, and never write them.
 */
#ifndef NSN_SLOTS_H
#define NSN_SLOTS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#define NSN_SLOTS_MAX 4096 /* sessions of one application ID on one host */
#define NSN_SLOTS_MAGIC 0x31736c736e736e49ull
#define NSN_SLOTS_VERSION 3

struct nsn_slot {                /* 64 bytes, nsnd writes */
    uint64_t alive;              /* generation of the session that lives here, 0 when nobody does */
    uint64_t acknowledged;       /* highest interest sequence number of this session that is in the log */
    uint64_t generation;         /* last generation given out for this slot; survives the session */
    uint64_t identity[2];        /* the session's own 128-bit name */
    uint64_t start_time;         /* of its process, clock ticks since boot (/proc/PID/stat field 22) */
    uint32_t pid;
    uint32_t uid;                /* of the session's process, from the kernel */
    int32_t segment;             /* of an other: its place */
    uint32_t traits;             /* NSN_SLOT_OTHER, and the versions of the protocol that the session speaks */
};

#define NSN_SLOT_OTHER 1u /* its user is not nsnd's */
/* The versions of the protocol that a session speaks, of its slot's traits; 1 when none was said. */
static inline uint32_t nsn_slot_version_min(uint32_t traits) { return traits >> 8 & 0xff ? traits >> 8 & 0xff : 1; }
static inline uint32_t nsn_slot_version_max(uint32_t traits) { return traits >> 16 & 0xff ? traits >> 16 & 0xff : 1; }

struct nsn_slots_file {
    uint64_t magic;
    uint64_t token[2];           /* random, as in the file `slots`: a number may come to mean another segment */
    int32_t places;              /* segment with the places */
    uint32_t count;              /* NSN_SLOTS_MAX */
    uint64_t highest;            /* slots at and above this one were never used: bounds scans */
    uint64_t others;             /* raised after an other has come, or gone. 0: there never was one */
    uint64_t log __attribute__((aligned(64))); /* the head of the interest log (nsn_log.h) */
    uint8_t padding[4096 - 128] __attribute__((aligned(64)));
    struct nsn_slot slot[NSN_SLOTS_MAX];
};

struct nsn_page {                /* 4096 bytes, the slot's session writes */
    uint64_t publishing __attribute__((aligned(64))); /* stamp (ns) of the publish it is inside of, 0 when outside */
    uint64_t asleep __attribute__((aligned(64)));     /* odd: asleep under this number; raised at each change */
    struct nsn_counters {        /* for `insane-nats status`; monotonic unless said otherwise */
        uint64_t messages_out;   /* publishes that succeeded */
        uint64_t bytes_out;      /* their payload and header bytes */
        uint64_t messages_in;    /* messages handed to subscriptions */
        uint64_t bytes_in;
        uint64_t deliveries_out; /* records written into links */
        uint64_t dropped;        /* deliveries this session did not make to slow consumers, to full links (unreliable), or to
                                    a queue group of which nobody may have them; a relay's publishes that failed */
        uint64_t discarded;      /* messages this session threw away as a slow consumer */
        uint64_t slow_consumer;  /* times this session was one */
        uint64_t passed_on;      /* queue messages passed on to another member */
        uint64_t unroutable;     /* publishes that nobody was interested in */
        uint64_t link_errors;    /* links given up because the peer broke the protocol */
        uint64_t waits;          /* publishes that had to wait for a full link */
        uint64_t bells;          /* wake-ups sent */
        uint64_t links_out;      /* gauge */
        uint64_t links_in;       /* gauge */
        uint64_t link_bytes;     /* gauge: memory touched in outgoing links */
        uint64_t pool_bytes;     /* gauge: memory touched in the pool */
        uint64_t subscriptions;  /* gauge */
        uint64_t backlog_bytes;  /* gauge: what lies in this session's incoming links */
        uint64_t held_up;        /* publishers that were inside one publish for so long that a barrier here had to wait */
    } counters __attribute__((aligned(64)));
    char name[128];              /* the connection's name, NUL-terminated */
    uint8_t padding[4096 - 128 - 192 - 128];
};

struct nsn_place {               /* one slot's part of the places */
    struct nsn_page page;
    uint32_t board[NSN_SLOTS_MAX];
};

/* nsnd's side. Makes both segments, for its user alone, or takes over what is there. One nsnd a directory: the caller sees to
 * it. On failure a negative errno, and words in error. */
struct nsn_slots;
int nsn_slots_open(struct nsn_slots **slots, const char *directory, char *error, size_t error_size);
void nsn_slots_close(struct nsn_slots *slots);
/* Lets other users read, or not. 0, or a negative errno. */
int nsn_slots_share(struct nsn_slots *slots, bool shared);
/* The word for nsn_log_writer_open(). */
uint64_t *nsn_slots_log(struct nsn_slots *slots);
const struct nsn_slots_file *nsn_slots_view(const struct nsn_slots *slots);
/* The slot's place; an other's is read-only, and NULL when its segment has gone. */
struct nsn_place *nsn_slots_place(const struct nsn_slots *slots, uint32_t slot);
/* Gives a free slot (lowest first; its page and board zeroed); returns it, or -ENOSPC when all are taken. *generation is never
 * 0. */
int nsn_slots_claim(struct nsn_slots *slots, const uint64_t identity[2], uint32_t pid, uint64_t start_time, uint32_t uid,
                    uint32_t *generation);
/* The same for a session of another user, whose place is in this segment of process `pid`. Also -EPROTO, -EINVAL, -EIDRM, with
 * words in error: the segment is not such a place, or not there. */
int nsn_slots_claim_other(struct nsn_slots *slots, const uint64_t identity[2], uint32_t pid, uint64_t start_time, uint32_t uid,
                          int32_t segment, uint32_t *generation, char *error, size_t error_size);
/* The slot of a living session by identity, or -ENOENT. */
int nsn_slots_find(const struct nsn_slots *slots, const uint64_t identity[2]);
void nsn_slots_free_slot(struct nsn_slots *slots, uint32_t slot);
/* What the session speaks: to be said before its first interest is in the log, since by that others come to link with it. */
void nsn_slots_speaks(struct nsn_slots *slots, uint32_t slot, uint32_t version_min, uint32_t version_max);
void nsn_slots_acknowledge(struct nsn_slots *slots, uint32_t slot, uint64_t sequence);

/* A session's side: attaches both; the places read-only when the session is an other. 0, or a negative errno with words:
 * -EINVAL or -EIDRM when what the directory names is not there. */
struct nsn_slots_map {
    const struct nsn_slots_file *slots;
    struct nsn_place *places;    /* NSN_SLOTS_MAX of them */
};
int nsn_slots_map(struct nsn_slots_map *map, const char *directory, bool other, char *error, size_t error_size);
void nsn_slots_unmap(struct nsn_slots_map *map);

#endif
