/* Private: what a link's file looks like. Page 0 has one writer, the producer; the pages behind it have one, the consumer;
 * the chunks are written by the producer, and given back by the consumer. */
#ifndef NSN_LINK_LAYOUT_H
#define NSN_LINK_LAYOUT_H

#include <fcntl.h>
#include <stdint.h>
#include <sys/mman.h>

#include "nsn_link.h"
#include "nsn_shared.h"

#define NSN_LINK_SEALS (F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL)
#define NSN_LINK_NO_SEALS (F_SEAL_WRITE | F_SEAL_FUTURE_WRITE)

struct nsn_link_producer_words {
    uint64_t magic;
    uint32_t version;
    uint32_t chunks;
    uint64_t link_id;
    uint64_t tail __attribute__((aligned(NSN_CACHE_LINE))); /* position behind the last committed record */
    uint64_t reaped;               /* pool references whose release was seen, in the link's life */
    /* Seldom written, so that the consumer's look at it after every batch stays in its cache. */
    uint64_t want __attribute__((aligned(NSN_CACHE_LINE))); /* odd: ring when the following holds */
    uint64_t want_either;          /* 1: one of the two is enough, 0: both */
    uint64_t want_consumed;        /* the consumer's `consumed` is at least this */
    uint64_t want_released;        /* it has released at least so many references in the link's life */
    uint64_t stall;                /* how often the consumer has been given up */
    uint64_t dropped;              /* messages not written while it was, in the link's life */
    uint16_t map[NSN_LINK_CHUNKS] __attribute__((aligned(NSN_CACHE_LINE))); /* [logical % NSN_LINK_CHUNKS]: physical chunk */
};

struct nsn_link_consumer_words {
    uint64_t head __attribute__((aligned(NSN_CACHE_LINE))); /* position up to which everything was read */
    uint64_t consumed;             /* record and pool bytes read, in the link's life */
    uint64_t taken __attribute__((aligned(NSN_CACHE_LINE))); /* 1 and how many pool segments that came with it: mapped */
    uint64_t trim;                 /* odd: memory is being given back */
    uint64_t trimmed;              /* how often it was */
    uint64_t stall_acknowledged;   /* highest `stall` that was acted upon */
    uint64_t passed;               /* head that is about to be published: memory below it may have been given back already */
    uint32_t released[NSN_LINK_REFS] __attribute__((aligned(NSN_CACHE_LINE))); /* by ref: the use that was released last */
};

struct nsn_link_file {
    struct nsn_link_producer_words producer __attribute__((aligned(4096)));
    struct nsn_link_consumer_words consumer __attribute__((aligned(4096)));
    uint8_t hole[NSN_LINK_CHUNK - 4096 - sizeof(struct nsn_link_consumer_words)]; /* never touched */
    uint8_t chunk[NSN_LINK_CHUNKS][NSN_LINK_CHUNK]; /* whole pages, also where those have 64 KiB */
};

_Static_assert(offsetof(struct nsn_link_file, chunk) == NSN_LINK_CHUNK, "chunks are aligned to their size");
_Static_assert(sizeof(struct nsn_link_producer_words) <= 4096, "the producer's words fit into a page");
_Static_assert(sizeof(struct nsn_record) == 32 && sizeof(struct nsn_pool_ref) == 24, "records have no padding");

#define NSN_LINK_TABLE_CHUNKS 32u  /* chunks that one page of a page table maps, where pages have 4 KiB */

static inline uint64_t nsn_link_chunk_of(uint64_t position) { return position / NSN_LINK_CHUNK; }
static inline uint32_t nsn_link_offset_of(uint64_t position) { return (uint32_t)(position % NSN_LINK_CHUNK); }

/* Carries on where another consumer stood. */
void nsn_link_in_resume(struct nsn_link_in *link, uint64_t head, uint64_t consumed);

/* Lets go of one end's page tables for the chunks, which outlive the memory that was given back; the contents stay. */
static inline void nsn_link_forget_tables(struct nsn_link_file *file)
{
    (void)madvise(file->chunk, sizeof file->chunk, MADV_DONTNEED); /* refused: they stay, which costs memory, nothing else */
}

/* For tests under ThreadSanitizer, which takes two mappings of one file for different memory: a consumer on the producer's
 * own mapping. It must be destroyed first. */
struct nsn_link_file *nsn_link_out_file(struct nsn_link_out *link);
int nsn_link_in_adopt(struct nsn_link_in **link, struct nsn_link_file *file, uint64_t link_id, char *error, size_t error_size);

#endif
