/* Giving memory back (nsn_link_in_trim_begin and _end, nsn_trim, follow_trim() and nsn_link_out_reserve): the consumer of an
 * empty link raises its trim number and looks whether the producer is inside a publish; if not, it gives back the chunks it
 * has read, and of the one it stands in all but the page of its head. The producer looks at the number inside each publish,
 * behind the fence, and meanwhile writes into a chunk of the upper part, which is given back before it is free.
 *
 * Holds: no record, nor the mark that ends a chunk, is given back before it was read.
 * Take out: NO_PRODUCER_FENCE, NO_CONSUMER_FENCE, NO_LOOK (at the publisher's word), NO_SECOND_LOOK (whether the link is still
 * empty), NO_UPPER_PART (the number is not heeded), NO_KEPT_PAGE (the head's page is given back too), OUTSIDE (a record is
 * written outside a publish). */
#define MESSAGES 5
#define CHUNK 2 /* records, each of a page; one more page holds the mark at a full chunk's end */
#define PAGES 3
#define CHUNKS 4 /* the first is the lower part */
#define UPPER 1
#define TRIMS 2

#define PAGE(chunk, offset) (PAGES * chunk + offset)
#define MAP(logical) (12 + logical % CHUNKS)
#define TAIL 16 /* records committed */
#define PUBLISHING 17
#define HEAD 18 /* logical chunks that the consumer has left */
#define TRIM 19
#define CELLS 20
#define PRODUCER 0
#define CONSUMER 1
#define WRITERS 2
#define DEPTH 4
#include "tso.pml"

#define SKIP 1 /* what a page holds: nothing, a skip mark, or a record */
#define RECORD(number) (2 + number)

/* The lowest free chunk from the first one on. */
inline take_chunk(first)
{
    physical = first;
    do
    :: used[physical] -> physical++; assert(physical < CHUNKS)
    :: else -> break
    od;
    used[physical] = true
}

proctype producer()
{
    byte sent, trim, chunk_trim, freed, logical, offset, physical;
    byte map[CHUNKS];
    bool used[CHUNKS], begun;
    do
    :: sent < MESSAGES ->
#ifndef OUTSIDE
        STORE(PRODUCER, PUBLISHING, 1);
#ifndef NO_PRODUCER_FENCE
        FENCE(PRODUCER);
#endif
#endif
        trim = memory[TRIM]; /* nsn_link_out_room */
        atomic {
            do
            :: freed < memory[HEAD] -> used[map[freed % CHUNKS]] = false; freed++
            :: else -> break
            od
        }
#ifdef NO_UPPER_PART
        trim = 0;
#endif
        if
        :: begun && (offset == CHUNK || ((trim & 1) && chunk_trim != trim)) ->
            atomic { STORE(PRODUCER, PAGE(physical, offset), SKIP); begun = false; logical++ } /* end_chunk */
        :: else
        fi;
        if
        :: !begun ->
            atomic {
                if
                :: trim & 1 -> take_chunk(UPPER)
                :: else -> take_chunk(0)
                fi;
                map[logical % CHUNKS] = physical;
                chunk_trim = trim;
                offset = 0;
                begun = true;
                STORE(PRODUCER, MAP(logical), physical)
            }
        :: else
        fi;
        atomic { STORE(PRODUCER, PAGE(physical, offset), RECORD(sent)); offset++; sent++ }
        STORE(PRODUCER, TAIL, sent);
#ifndef OUTSIDE
        STORE(PRODUCER, PUBLISHING, 0)
#endif
    :: else -> break
    od
}

/* MADV_REMOVE, a system call: it is in force at once. */
inline give_back(chunk, kept)
{
    page = 0;
    do
    :: page < PAGES && page != kept -> memory[PAGE(chunk, page)] = 0; page++
    :: page < PAGES && page == kept -> page++
    :: page == PAGES -> page = 0; break
    od
}

proctype consumer()
{
    byte head, trim, trims, trimmed_at = 255, logical, offset, physical, page, at;
    bool left[UPPER], open;
    do
    :: head < MESSAGES && memory[TAIL] > head -> /* peek and consume */
        if
        :: !open -> atomic { physical = memory[MAP(logical)]; open = true }
        :: else
        fi;
        if
        :: memory[PAGE(physical, offset)] == SKIP ->
            assert(offset);
            atomic {
                if
                :: physical < UPPER -> left[physical] = true
                :: else -> give_back(physical, PAGES) /* before its chunk is free */
                fi;
                logical++;
                offset = 0;
                physical = memory[MAP(logical)];
                STORE(CONSUMER, HEAD, logical)
            }
        :: else
        fi;
        atomic {
            if
            :: physical < UPPER -> left[physical] = false
            :: else
            fi;
            assert(memory[PAGE(physical, offset)] == RECORD(head));
            offset++;
            head++
        }
    :: trims < TRIMS && head && head != trimmed_at && memory[TAIL] == head ->
        atomic { trims++; trim++; STORE(CONSUMER, TRIM, trim) }
#ifndef NO_CONSUMER_FENCE
        FENCE(CONSUMER);
#endif
        if
#ifndef NO_LOOK
        :: memory[PUBLISHING]
#endif
        :: else ->
            if
#ifndef NO_SECOND_LOOK
            :: memory[TAIL] != head
#endif
            :: else ->
                trimmed_at = head;
                at = 0;
                do
                :: at < UPPER && left[at] -> atomic { left[at] = false; give_back(at, PAGES); at++ }
                :: at < UPPER && !left[at] -> at++
                :: at == UPPER -> at = 0; break
                od;
#ifdef NO_KEPT_PAGE
                atomic { give_back(physical, PAGES) }
#else
                atomic { give_back(physical, offset) }
#endif
            fi
        fi;
        atomic { trim++; STORE(CONSUMER, TRIM, trim) }
    :: head == MESSAGES -> break
    od
}

init { atomic { run buffer(PRODUCER); run buffer(CONSUMER); run producer(); run consumer() } }
