/* The buffers that a program holds: which memory is behind each, and that none is given back twice.
 *
 * Small buffers to be emitted are memory of this process, which is copied into the links: that is quicker than a block of
 * the pool up to the size that a link takes in. Loans are shared by all sessions of the process and are never freed.
 */
#include <errno.h>
#include <sched.h>
#include <stdlib.h>

#include "nsn_insane_internal.h"
#include "nsn_link.h"

#define CLASSES 4                 /* of own memory; the last: none */
#define PAGE 256u
#define PAGES 65536u              /* 16 million buffers */
#define CHUNKS_KEPT 4u
#define SPINS 100

static const uint32_t class_bytes[CLASSES - 1] = {256, 2048, NSN_INLINE_MAX};

_Static_assert(sizeof(size_t) == 8, "a buffer's index has its number and its generation");

static struct {
    struct nsn_latch latch;
    struct nsn_loan *free[CLASSES];
    struct nsn_loan *pages[PAGES];
    uint32_t page_count;
} loans;

void nsn_latch_wait(struct nsn_latch *latch)
{
    for (uint32_t round = 1; __atomic_exchange_n(&latch->taken, 1, __ATOMIC_ACQUIRE); round++)
        if (round % SPINS)
            nsn_cpu_relax();
        else
            sched_yield();
}

static size_t index_of(const struct nsn_loan *loan) { return (size_t)loan->generation << 32 | loan->number; }

/* A new page of loans without memory, with the latch held. */
static bool add_page(void)
{
    struct nsn_loan *page = loans.page_count < PAGES ? calloc(PAGE, sizeof *page) : NULL;
    if (!page)
        return false;
    for (uint32_t i = 0; i < PAGE; i++)
        page[i] = (struct nsn_loan){.number = loans.page_count * PAGE + i, .size_class = CLASSES - 1,
                                    .next = i + 1 < PAGE ? &page[i + 1] : NULL};
    loans.free[CLASSES - 1] = page;
    __atomic_store_n(&loans.pages[loans.page_count++], page, __ATOMIC_RELEASE); /* pairs with nsn_loan_find() */
    return true;
}

struct nsn_loan *nsn_loan_take(struct nsn_insane *insane, uint64_t size)
{
    uint32_t class = 0;
    while (class < CLASSES - 1 && (size == UINT64_MAX || class_bytes[class] < size))
        class++;
    nsn_latch_take(&loans.latch);
    struct nsn_loan *loan = loans.free[class];
    bool bare = !loan;
    if (bare && (loans.free[CLASSES - 1] || add_page()))
        loan = loans.free[CLASSES - 1];
    if (loan)
        loans.free[loan->size_class] = loan->next;
    nsn_latch_give(&loans.latch);
    if (!loan)
        return NULL;
    if (bare && class < CLASSES - 1) {
        loan->data = malloc(class_bytes[class]);
        if (!loan->data) {
            nsn_loan_give(loan);
            return NULL;
        }
        loan->size_class = (uint8_t)class;
        loan->capacity = class_bytes[class];
    }
    loan->kind = NSN_LOAN_OWN;
    loan->next = NULL;
    loan->buffer.index = index_of(loan);
    __atomic_store_n(&loan->owner, insane, __ATOMIC_RELEASE);
    return loan;
}

void nsn_loan_give(struct nsn_loan *loan)
{
    nsn_latch_take(&loans.latch);
    __atomic_store_n(&loan->owner, NULL, __ATOMIC_RELEASE); /* as the next: pairs with nsn_loan_find() */
    __atomic_store_n(&loan->generation, loan->generation + 1, __ATOMIC_RELEASE);
    loan->next = loans.free[loan->size_class];
    loans.free[loan->size_class] = loan;
    nsn_latch_give(&loans.latch);
}

struct nsn_loan *nsn_loan_find(struct nsn_insane *insane, const nsn_buffer_t *buffer)
{
    uint32_t number = (uint32_t)buffer->index, generation = (uint32_t)(buffer->index >> 32);
    if (number / PAGE >= PAGES)
        return NULL;
    struct nsn_loan *page = __atomic_load_n(&loans.pages[number / PAGE], __ATOMIC_ACQUIRE); /* pairs with add_page() */
    if (!page)
        return NULL;
    struct nsn_loan *loan = &page[number % PAGE];
    return __atomic_load_n(&loan->owner, __ATOMIC_ACQUIRE) == insane &&
           __atomic_load_n(&loan->generation, __ATOMIC_ACQUIRE) == generation && buffer->data == loan->data ? loan : NULL;
}

void nsn_loan_release(struct nsn_insane *insane, struct nsn_loan *loan)
{
    if (loan->kind == NSN_LOAN_BLOCK)
        nsn_buffer_drop(insane->session, &loan->block);
    else if (loan->kind == NSN_LOAN_CHUNK)
        nsn_chunk_drop(insane, loan->chunk);
    else if (loan->kind == NSN_LOAN_LARGE)
        nsn_large_release(insane->session, loan->large);
    nsn_loan_give(loan);
}

/* What pool blocks and large messages carry goes with the session; chunks go here. */
void nsn_loans_forget(struct nsn_insane *insane)
{
    struct nsn_loan *page;
    for (uint32_t number = 0; number < PAGES && (page = __atomic_load_n(&loans.pages[number], __ATOMIC_ACQUIRE)); number++)
        for (uint32_t i = 0; i < PAGE; i++) {
            struct nsn_loan *loan = &page[i];
            if (__atomic_load_n(&loan->owner, __ATOMIC_ACQUIRE) == insane)
                nsn_loan_release(insane, loan);
        }
}

/* --- chunks ------------------------------------------------------------------------------------------------------- */

static void put_down(struct nsn_insane *insane, struct nsn_chunk *chunk, uint32_t references)
{
    /* pairs with nsn_chunk_fill() and with itself in other threads: who writes here next comes behind all who read */
    if (__atomic_sub_fetch(&chunk->references, references, __ATOMIC_ACQ_REL))
        return;
    nsn_latch_take(&insane->chunk_latch);
    bool keep = insane->free_chunk_count < CHUNKS_KEPT;
    if (keep) {
        chunk->next = insane->free_chunks;
        insane->free_chunks = chunk;
        insane->free_chunk_count++;
    }
    nsn_latch_give(&insane->chunk_latch);
    if (!keep)
        free(chunk);
}

void nsn_chunk_drop(struct nsn_insane *insane, struct nsn_chunk *chunk) { put_down(insane, chunk, 1); }

static void begin(struct nsn_chunk *chunk)
{
    chunk->used = chunk->lent = 0;
    __atomic_store_n(&chunk->references, NSN_CHUNK_OPEN, __ATOMIC_RELAXED); /* nobody else knows of it */
}

/* The chunk that the next receive writes into, with room for it. NULL: no memory. The session's lock is held. */
struct nsn_chunk *nsn_chunk_fill(struct nsn_insane *insane)
{
    struct nsn_chunk *chunk = insane->filling;
    /* all are back; pairs with put_down() */
    if (chunk && chunk->used && __atomic_load_n(&chunk->references, __ATOMIC_ACQUIRE) == NSN_CHUNK_OPEN - chunk->lent)
        begin(chunk);
    if (chunk && NSN_CHUNK_BYTES - chunk->used >= NSN_RECEIVE_BYTES)
        return chunk;
    if (chunk) {
        insane->filling = NULL;
        put_down(insane, chunk, NSN_CHUNK_OPEN - chunk->lent);
    }
    nsn_latch_take(&insane->chunk_latch);
    chunk = insane->free_chunks;
    if (chunk) {
        insane->free_chunks = chunk->next;
        insane->free_chunk_count--;
    }
    nsn_latch_give(&insane->chunk_latch);
    if (!chunk && !(chunk = malloc(sizeof *chunk)))
        return NULL;
    chunk->next = NULL;
    begin(chunk);
    return insane->filling = chunk;
}
