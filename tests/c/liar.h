/* A session without libnsn's manners: it speaks the control protocol by hand, has its links mapped, and writes whatever it
 * likes into them. What it is told to write honestly goes through a link's own producer. */
#ifndef LIAR_H
#define LIAR_H

#include <fcntl.h>
#include <sys/mman.h>

#include "node.h"
#include "nsn_link_layout.h"
#include "nsn_memfd.h"
#include "nsn_pool.h"

#define LIAR_RECORDS 256 /* places of honest records that are remembered */

struct liar {
    int control;
    uint32_t slot, generation;
    struct nsn_slots_map map;
    uint64_t link_ids;
    uint64_t interest;                      /* packets sent */

    struct nsn_link_out *out;               /* to the victim */
    struct nsn_link_file *file;             /* another mapping of it */
    struct nsn_pool *pool;
    struct nsn_block *block;                /* a segment of this one was handed over */
    uint32_t victim_slot, victim_generation;
    uint8_t *records[LIAR_RECORDS];         /* where they lie in `file` */
    uint32_t record_count;

    struct nsn_link_file *in;               /* from the victim */
};

static inline uint64_t random_next(uint64_t *seed)
{
    *seed ^= *seed << 13;
    *seed ^= *seed >> 7;
    *seed ^= *seed << 17;
    return *seed;
}

static inline void liar_hello(struct liar *liar, struct node *node)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    struct nsn_hello hello = {.packet = {NSN_PROTOCOL_MAGIC, NSN_HELLO, NSN_PROTOCOL_VERSION}, .application_id = 4222,
                              .version_min = 1, .identity = {(uintptr_t)liar, 1}, .slot = UINT32_MAX, .name = "liar"};
    struct nsn_welcome welcome;
    char error[256] = "";
    *liar = (struct liar){.control = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0)};
    strcpy(address.sun_path, node->socket_path);
    CHECK_EQUAL(connect(liar->control, (struct sockaddr *)&address, sizeof address), 0);
    CHECK_EQUAL(send(liar->control, &hello, sizeof hello, 0), sizeof hello);
    CHECK_EQUAL(recv(liar->control, &welcome, sizeof welcome, 0), sizeof welcome);
    liar->slot = welcome.slot;
    liar->generation = welcome.generation;
    CHECK_EQUAL(nsn_slots_map(&liar->map, welcome.directory, false, error, sizeof error), 0);
    liar->pool = nsn_pool_new();
}

static inline struct nsn_page *liar_page(struct liar *liar) { return &liar->map.places[liar->slot].page; }

/* Its word on the victim's board. */
static inline uint32_t *liar_board(struct liar *liar) { return &liar->map.places[liar->victim_slot].board[liar->slot]; }

static inline void liar_subscribe(struct liar *liar, uint32_t sid, const char *pattern, const char *queue)
{
    struct {
        struct nsn_interest interest;
        struct nsn_interest_change change;
        char names[64];
    } packet = {.interest = {.packet = {NSN_PROTOCOL_MAGIC, NSN_INTEREST, NSN_PROTOCOL_VERSION}, .sequence = ++liar->interest,
                             .count = 1},
                .change = {.op = NSN_INTEREST_ADD, .pattern_length = (uint16_t)strlen(pattern),
                           .queue_length = (uint16_t)strlen(queue), .sid = sid}};
    strcpy(packet.names, pattern);
    strcat(packet.names, queue);
    packet.interest.length = (uint32_t)((sizeof packet.change + strlen(packet.names) + 7) & ~7ull);
    node_send(liar->control, &packet, sizeof packet.interest + packet.interest.length, -1);
    struct nsn_interest_done done;
    CHECK_EQUAL(recv(liar->control, &done, sizeof done, 0), sizeof done);
    CHECK_EQUAL(done.error, 0);
}

/* Hands any descriptor over as a link; it stays the caller's. */
static inline void liar_hand_over(struct liar *liar, uint64_t link_id, int fd)
{
    struct nsn_link_packet packet = {.packet = {NSN_PROTOCOL_MAGIC, NSN_LINK, NSN_PROTOCOL_VERSION},
                                     .peer_slot = liar->victim_slot, .peer_generation = liar->victim_generation,
                                     .link_id = link_id};
    node_send(liar->control, &packet, sizeof packet, fd);
}

static inline void liar_hand_over_segment(struct liar *liar, uint32_t segment, uint64_t size, int fd)
{
    struct nsn_segment_packet packet = {.packet = {NSN_PROTOCOL_MAGIC, NSN_SEGMENT, NSN_PROTOCOL_VERSION},
                                        .peer_slot = liar->victim_slot, .peer_generation = liar->victim_generation,
                                        .segment = segment, .size = size};
    node_send(liar->control, &packet, sizeof packet, fd);
}

static inline void liar_unlink(struct liar *liar)
{
    if (liar->out) {
        munmap(liar->file, sizeof *liar->file);
        if (liar->block)
            nsn_block_drop(liar->pool, liar->block, 0);
        nsn_link_out_destroy(liar->out, liar->pool);
    }
    liar->out = NULL;
    liar->file = NULL;
    liar->block = NULL;
    liar->record_count = 0;
}

/* A new link, and a block of a pool segment that belongs to it. Returns the link's descriptor. */
static inline int liar_make_link(struct liar *liar)
{
    char error[256] = "";
    int fd;
    liar_unlink(liar);
    CHECK_EQUAL(nsn_link_out_create(&liar->out, ++liar->link_ids, 0, &fd, error, sizeof error), 0);
    liar->file = nsn_memfd_map(fd, sizeof *liar->file, PROT_READ | PROT_WRITE, error, sizeof error);
    CHECK(liar->file);
    CHECK_EQUAL(nsn_pool_take(liar->pool, 100, 1 << 28, &liar->block), 0);
    return fd;
}

/* A new, honest link to the victim, which has it when this returns. */
static inline void liar_link(struct liar *liar, struct nsn_session *victim)
{
    struct nsn_session_info info;
    uint32_t index;
    uint64_t size;
    int segment, fd = liar_make_link(liar);
    nsn_session_info(victim, &info);
    liar->victim_slot = info.slot;
    liar->victim_generation = info.generation;
    liar_hand_over(liar, liar->link_ids, fd);
    close(fd);
    CHECK_EQUAL(nsn_pool_segment(liar->pool, liar->block->segment, &index, &segment, &size), 0);
    liar_hand_over_segment(liar, liar->block->segment, size, segment);
    WAIT_FOR(victim, nsn_link_out_taken(liar->out));
}

/* What a record may claim; the honest values are filled in by liar_write(). */
struct liar_record {
    uint32_t sids[NSN_RECORD_SIDS];
    uint32_t sid_count;
    const char *subject, *reply;
    uint32_t payload_length;
    bool pool;
    uint64_t stamp;                         /* 0: now */
};

/* Writes an honest record and does not commit it; NULL: no room. */
static inline struct nsn_record *liar_reserve(struct liar *liar, const struct liar_record *wanted)
{
    uint32_t subject = (uint32_t)strlen(wanted->subject), reply = wanted->reply ? (uint32_t)strlen(wanted->reply) : 0;
    uint32_t sid_bytes = (4 * wanted->sid_count + 7) & ~7u;
    uint32_t inside = wanted->pool ? (uint32_t)sizeof(struct nsn_pool_ref) : wanted->payload_length;
    uint32_t length = ((uint32_t)sizeof(struct nsn_record) + sid_bytes + subject + reply + inside + 7) & ~7u;
    if (nsn_link_out_room(liar->out, length, wanted->pool ? wanted->payload_length : 0) != 1)
        return NULL;
    uint8_t *at = nsn_link_out_reserve(liar->out, length);
    struct nsn_record *record = (struct nsn_record *)(void *)at;
    *record = (struct nsn_record){.length = length, .kind = NSN_RECORD_MESSAGE, .flags = wanted->pool ? NSN_RECORD_POOL : 0,
                                  .sid_count = (uint16_t)wanted->sid_count, .subject_length = (uint16_t)subject,
                                  .reply_length = (uint16_t)reply, .payload_length = wanted->payload_length,
                                  .stamp = wanted->stamp ? wanted->stamp : nsn_now_ns()};
    memcpy(at + sizeof *record, wanted->sids, 4 * wanted->sid_count);
    at += sizeof *record + sid_bytes;
    if (wanted->pool) {
        struct nsn_pool_ref ref = {.segment = liar->block->segment, .offset = liar->block->offset};
        nsn_link_out_refer(liar->out, liar->block, wanted->payload_length, &ref);
        memcpy(at, &ref, sizeof ref);
        at += sizeof ref;
    }
    memcpy(at, wanted->subject, subject);
    if (reply)
        memcpy(at + subject, wanted->reply, reply);
    if (!wanted->pool)
        memset(at + subject + reply, 'x', wanted->payload_length);
    ptrdiff_t place = (uint8_t *)record - (uint8_t *)nsn_link_out_file(liar->out);
    liar->records[liar->record_count++ % LIAR_RECORDS] = (uint8_t *)liar->file + place;
    return record;
}

static inline struct nsn_pool_ref *liar_ref(struct nsn_record *record)
{
    return (struct nsn_pool_ref *)(void *)((uint8_t *)(record + 1) + ((4 * record->sid_count + 7) & ~7u));
}

static inline void liar_announce(struct liar *liar)
{
    nsn_store_release32(liar_board(liar), nsn_link_out_tail32(liar->out) << 1);
}

static inline void liar_commit(struct liar *liar)
{
    nsn_link_out_commit(liar->out);
    liar_announce(liar);
}

/* Takes what has come for it; maps the link from the victim. */
static inline void liar_take(struct liar *liar)
{
    _Alignas(8) uint8_t bytes[4096];
    union {
        char bytes[CMSG_SPACE(sizeof(int))];
        struct cmsghdr align;
    } ancillary;
    char error[256];
    for (;;) {
        struct iovec part = {bytes, sizeof bytes};
        struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1, .msg_control = ancillary.bytes,
                                 .msg_controllen = sizeof ancillary.bytes};
        if (recvmsg(liar->control, &message, MSG_DONTWAIT | MSG_CMSG_CLOEXEC) <= 0)
            return;
        struct cmsghdr *header = CMSG_FIRSTHDR(&message);
        if (!header)
            continue;
        int fd;
        memcpy(&fd, CMSG_DATA(header), sizeof fd);
        if (((struct nsn_packet *)(void *)bytes)->type == NSN_LINK) {
            if (liar->in)
                munmap(liar->in, sizeof *liar->in);
            liar->in = nsn_memfd_map(fd, sizeof *liar->in, PROT_READ | PROT_WRITE, error, sizeof error);
            CHECK(liar->in);
        }
        close(fd);
    }
}

/* Its process "dies": the node tells everybody. */
static inline void liar_end(struct liar *liar)
{
    close(liar->control);
    liar_unlink(liar);
    if (liar->in)
        munmap(liar->in, sizeof *liar->in);
    nsn_pool_free(liar->pool);
    nsn_slots_unmap(&liar->map);
}

#endif
