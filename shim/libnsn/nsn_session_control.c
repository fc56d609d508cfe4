/* A session's talk with nsnd: packets out, packets in, and what has to be said again after a reattachment. */
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

#include "nsn_segment.h"
#include "nsn_session_internal.h"

void nsn_detach(struct nsn_session *s, const char *why)
{
    if (s->control >= 0)
        close(s->control);
    s->control = -1;
    while (s->outgoing) { /* said anew at reattachment, from what is remembered */
        struct nsn_outgoing *packet = s->outgoing;
        s->outgoing = packet->next;
        free(packet);
    }
    s->outgoing_last = &s->outgoing;
    if (s->state != NSN_REFUSED_STATE && s->state != NSN_CLOSED) {
        s->state = NSN_DETACHED;
        nsn_fail(s, -ENOTCONN, "nsnd is gone (%s)", why);
    }
}

static ssize_t send_packet(int control, const void *bytes, size_t length, int fd)
{
    struct iovec part = {(void *)bytes, length};
    struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1};
    union {
        char bytes[CMSG_SPACE(sizeof(int))];
        struct cmsghdr align;
    } ancillary;
    if (fd >= 0) {
        memset(&ancillary, 0, sizeof ancillary);
        message.msg_control = ancillary.bytes;
        message.msg_controllen = sizeof ancillary.bytes;
        struct cmsghdr *header = CMSG_FIRSTHDR(&message);
        header->cmsg_level = SOL_SOCKET;
        header->cmsg_type = SCM_RIGHTS;
        header->cmsg_len = CMSG_LEN(sizeof(int));
        memcpy(CMSG_DATA(header), &fd, sizeof fd);
    }
    ssize_t sent;
    do
        sent = sendmsg(control, &message, MSG_NOSIGNAL);
    while (sent < 0 && errno == EINTR);
    return sent < 0 ? -errno : sent;
}

/* True when the packet must wait: the socket is full, or too many descriptors are on their way to nsnd. */
static bool must_wait(ssize_t result)
{
    return result == -EAGAIN || result == -ENOBUFS || result == -ETOOMANYREFS || result == -ENOMEM;
}

int nsn_control_flush(struct nsn_session *s)
{
    while (s->control >= 0 && s->outgoing) {
        struct nsn_outgoing *packet = s->outgoing;
        ssize_t result = send_packet(s->control, packet->bytes, packet->length, packet->fd);
        if (must_wait(result))
            return 0;
        if (result < 0) {
            /* What nsnd said before it closed (a refusal) is still to be read. */
            if (nsn_control_receive(s) < 0 || s->control < 0)
                return s->state == NSN_REFUSED_STATE ? -ECONNREFUSED : -ENOTCONN;
            nsn_detach(s, strerror((int)-result));
            return (int)result;
        }
        s->outgoing = packet->next;
        if (!s->outgoing)
            s->outgoing_last = &s->outgoing;
        free(packet);
    }
    return 0;
}

int nsn_control_send(struct nsn_session *s, const void *packet, size_t length, int fd)
{
    if (s->control < 0)
        return -ENOTCONN;
    /* When it fails for good, nsn_control_flush() finds that out: what nsnd said last is read first, and that may end links,
     * which the caller is in the middle of. */
    if (!s->outgoing && send_packet(s->control, packet, length, fd) >= 0)
        return 0;
    struct nsn_outgoing *entry = malloc(sizeof *entry + length);
    if (!entry)
        return nsn_fail(s, -ENOMEM, "no memory for a packet to nsnd");
    *entry = (struct nsn_outgoing){.fd = fd, .length = (uint32_t)length};
    memcpy(entry->bytes, packet, length);
    *s->outgoing_last = entry;
    s->outgoing_last = &entry->next;
    return 0;
}

static struct nsn_packet header(const struct nsn_session *s, uint16_t type)
{
    return (struct nsn_packet){.magic = NSN_PROTOCOL_MAGIC, .type = type, .version = s->protocol};
}

int nsn_control_hello(struct nsn_session *s)
{
    struct ucred node;
    socklen_t size = sizeof node;
    if (getsockopt(s->control, SOL_SOCKET, SO_PEERCRED, &node, &size) < 0)
        return nsn_fail(s, -errno, "the kernel does not say who nsnd is: %s", strerror(errno));
    s->node_pid = (uint32_t)node.pid;
    s->node_uid = node.uid;
    s->is_other = s->node_uid != geteuid();
    if (s->is_other) {
        int result = nsn_own_place_make(s);
        if (result < 0)
            return result;
    }
    s->challenged = false;
    s->refusal = 0;
    struct nsn_hello hello = {
        .packet = {NSN_PROTOCOL_MAGIC, NSN_HELLO, NSN_PROTOCOL_VERSION},
        .application_id = s->options.application_id,
        .version_min = NSN_PROTOCOL_VERSION_MIN,
        .identity = {s->identity[0], s->identity[1]},
        .slot = s->generation ? s->slot : UINT32_MAX,
        .generation = s->generation,
        .acknowledged = s->settled,
        .segment = s->is_other ? s->own_segment : -1,
        .flags = (s->options.answers ? NSN_HELLO_ANSWERS : 0) | (s->options.relay ? NSN_HELLO_RELAY : 0),
    };
    memcpy(hello.name, s->name, sizeof hello.name);
    return nsn_control_send(s, &hello, sizeof hello, -1);
}

static void challenged(struct nsn_session *s, const struct nsn_challenge *challenge)
{
    memcpy(s->nonce, challenge->nonce, sizeof s->nonce);
    s->nonce[sizeof s->nonce - 1] = 0;
    s->challenged = true;
}

int nsn_control_credentials(struct nsn_session *s, const uint8_t *json, size_t length)
{
    _Alignas(8) uint8_t packet[NSN_PACKET_MAX];
    struct nsn_credentials front = {.packet = header(s, NSN_CREDENTIALS), .length = (uint32_t)length};
    if (length > sizeof packet - sizeof front)
        return nsn_fail(s, -EMSGSIZE, "credentials have at most %zu bytes", sizeof packet - sizeof front);
    memcpy(packet, &front, sizeof front);
    memcpy(packet + sizeof front, json, length);
    s->challenged = false;
    int result = nsn_control_send(s, packet, sizeof front + length, -1);
    explicit_bzero(packet, sizeof packet);
    return result;
}

/* --- interest ---------------------------------------------------------------------------------------------------- */

void nsn_interest_flush(struct nsn_session *s)
{
    struct nsn_batch *batch = s->batch;
    if (!batch)
        return;
    s->batch = NULL;
    batch->sequence = ++s->sequence;
    struct nsn_interest *front = (struct nsn_interest *)batch->bytes;
    *front = (struct nsn_interest){.packet = header(s, NSN_INTEREST), .sequence = batch->sequence, .count = batch->count,
                                   .length = batch->length - (uint32_t)sizeof *front};
    *s->sent_last = batch;
    s->sent_last = &batch->next;
    if (s->state == NSN_READY)
        nsn_control_send(s, batch->bytes, batch->length, -1);
}

/* The batch that is being made, with room for so many bytes more. NULL: no memory. */
static struct nsn_batch *batch_with_room(struct nsn_session *s, uint32_t length)
{
    uint32_t used = s->batch ? s->batch->length : (uint32_t)sizeof(struct nsn_interest);
    if (s->batch && used + length <= s->batch->capacity)
        return s->batch;
    uint32_t capacity = 2 * used + length; /* mostly one change, and up to thousands */
    struct nsn_batch *batch = realloc(s->batch, sizeof *batch + capacity);
    if (!batch)
        return NULL;
    if (!s->batch)
        *batch = (struct nsn_batch){.length = used};
    batch->capacity = capacity;
    s->batch = batch;
    return batch;
}

int nsn_interest_queue(struct nsn_session *s, uint8_t op, uint32_t sid, const char *pattern, size_t pattern_length,
                       const char *queue, size_t queue_length)
{
    uint32_t length = (uint32_t)((sizeof(struct nsn_interest_change) + pattern_length + queue_length + 7) & ~7ull);
    if (s->batch && s->batch->length + length > NSN_PACKET_MAX)
        nsn_interest_flush(s);
    struct nsn_batch *batch = batch_with_room(s, length);
    if (!batch)
        return nsn_fail(s, -ENOMEM, "no memory for a change of interest");
    struct nsn_interest_change change = {.op = op, .pattern_length = (uint16_t)pattern_length,
                                         .queue_length = (uint16_t)queue_length, .sid = sid};
    uint8_t *at = batch->bytes + batch->length;
    memset(at + length - 8, 0, 8); /* what lies between changes */
    memcpy(at, &change, sizeof change);
    memcpy(at + sizeof change, pattern, pattern_length);
    memcpy(at + sizeof change + pattern_length, queue, queue_length);
    batch->length += length;
    batch->count++;
    return 0;
}

static void forget_batches(struct nsn_session *s, uint64_t sequence)
{
    while (s->sent && s->sent->sequence <= sequence) {
        struct nsn_batch *batch = s->sent;
        s->sent = batch->next;
        if (!s->sent)
            s->sent_last = &s->sent;
        free(batch);
    }
    if (sequence > s->settled)
        s->settled = sequence;
}

/* True when every change up to now is in the log: one acquire load of a word that nsnd writes. */
bool nsn_interest_known(struct nsn_session *s)
{
    if (s->settled >= s->sequence || !s->map.slots)
        return !s->batch && s->settled >= s->sequence;
    /* pairs with the release store in nsn_slots_acknowledge, which comes behind the log's */
    uint64_t acknowledged = nsn_load_acquire(&s->map.slots->slot[s->slot].acknowledged);
    if (acknowledged > s->sequence)
        return false; /* not this session's any more */
    if (acknowledged > s->settled)
        s->settled = acknowledged;
    return !s->batch && s->settled >= s->sequence;
}

/* An errno as nsnd gives it, of whatever sign. */
static int negative(int32_t error) { return error > 0 ? -error : error > -4096 ? error : -EPROTO; }

/* nsnd refused a change: says which subscription it was, and sends what stood behind it again, as a new batch. */
static void interest_refused(struct nsn_session *s, const struct nsn_interest_done *done)
{
    struct nsn_batch *batch = s->sent;
    while (batch && batch->sequence != done->sequence)
        batch = batch->next;
    if (!batch || done->failed >= batch->count)
        return;
    const uint8_t *at = batch->bytes + sizeof(struct nsn_interest);
    for (uint32_t i = 0; i < batch->count; i++) {
        struct nsn_interest_change change;
        memcpy(&change, at, sizeof change);
        const char *names = (const char *)at + sizeof change;
        if (i == done->failed) {
            struct nsn_event event = {.kind = NSN_EVENT_INTEREST, .sid = change.sid, .error = negative(done->error)};
            snprintf(event.text, sizeof event.text, "nsnd refused the subscription to \"%.*s\": %s",
                     (int)(change.pattern_length < 80 ? change.pattern_length : 80), names, strerror(-negative(done->error)));
            nsn_post_event(s, &event);
            struct nsn_subscription *subscription = nsn_subscription_find(s, change.sid);
            if (subscription && change.op == NSN_INTEREST_ADD)
                nsn_subscription_remove(s, subscription);
        } else if (i > done->failed) {
            nsn_interest_queue(s, change.op, change.sid, names, change.pattern_length, names + change.pattern_length,
                               change.queue_length);
        }
        at += (sizeof change + change.pattern_length + change.queue_length + 7) & ~7ull;
    }
    nsn_interest_flush(s);
}

/* --- packets from nsnd ------------------------------------------------------------------------------------------- */

static int enter_application(struct nsn_session *s, const struct nsn_welcome *welcome)
{
    int result = nsn_slots_map(&s->map, welcome->directory, s->is_other, s->error, sizeof s->error);
    if (result < 0)
        return result;
    s->uid = nsn_load_relaxed32(&s->map.slots->slot[welcome->slot].uid);
    if (s->is_other != (nsn_load_relaxed32(&s->map.slots->slot[welcome->slot].traits) & NSN_SLOT_OTHER))
        return nsn_fail(s, -EPROTO, "nsnd takes this program's user for another than it is");
    result = nsn_log_reader_open(&s->log, welcome->directory, &s->map.slots->log, s->error, sizeof s->error);
    if (result < 0)
        return result;
    s->bell = s->is_other ? s->own_bell : nsn_bell_bind(welcome->directory, welcome->slot, s->error, sizeof s->error);
    if (s->bell < 0)
        return s->bell;
    s->page = s->is_other ? &s->own_place->page : &s->map.places[welcome->slot].page;
    s->board = s->map.places[welcome->slot].board;
    s->sleep_number = 0;
    s->counters = (struct nsn_counters){0};
    nsn_copy_to_shared(s->page->name, s->name, sizeof s->name);
    nsn_others_renew(s, true);
    return 0;
}

static void leave_application(struct nsn_session *s)
{
    if (s->bell >= 0 && s->bell != s->own_bell)
        close(s->bell);
    if (s->spare >= 0)
        close(s->spare);
    nsn_ringer_close(&s->ringer);
    s->bell = s->spare = -1;
    nsn_log_reader_close(&s->log);
    nsn_others_free(s);
    if (s->own_place) /* as an nsnd gives a place */
        memset(s->own_place, 0, sizeof *s->own_place);
    nsn_slots_unmap(&s->map);
    nsn_routes_clear(s->routes);
    s->page = NULL;
    s->board = NULL;
}

/* nsnd knows this session no more: its links and interest are gone, with the files that told of them. */
static void start_over(struct nsn_session *s)
{
    while (s->outs)
        nsn_out_drop(s, s->outs);
    nsn_pool_retire(s->pool); /* with the links went all knowledge of who still borrows what */
    nsn_in_drop_all(s);
    forget_batches(s, UINT64_MAX);
    free(s->batch);
    s->batch = NULL;
    s->sequence = s->settled = 0;
    nsn_subscriptions_free(s);
    nsn_barriers_free(s);
    nsn_pass_on_free(s);
    memset(s->board_seen, 0, sizeof s->board_seen);
    leave_application(s);
}

static void welcomed(struct nsn_session *s, const struct nsn_welcome *welcome)
{
    bool first = s->generation == 0 && !s->lost;
    bool carried_on = !first && welcome->reattached && welcome->slot == s->slot && welcome->generation == s->generation &&
                      strncmp(welcome->directory, s->directory, sizeof s->directory) == 0;
    if (welcome->slot >= NSN_SLOTS_MAX || welcome->generation == 0 ||
        !memchr(welcome->directory, 0, sizeof welcome->directory)) {
        nsn_detach(s, "its welcome is broken");
        return;
    }
    if (welcome->packet.version < NSN_PROTOCOL_VERSION_MIN || welcome->packet.version > NSN_PROTOCOL_VERSION) {
        s->state = NSN_REFUSED_STATE;
        nsn_detach(s, "it speaks another protocol");
        nsn_fail(s, -EPROTONOSUPPORT, "nsnd speaks version %u of the control protocol, and this program %d to %d: install "
                 "versions of insane_nats that have one in common", welcome->packet.version, NSN_PROTOCOL_VERSION_MIN,
                 NSN_PROTOCOL_VERSION);
        return;
    }
    s->protocol = welcome->packet.version;
    s->client_id = welcome->client_id;
    s->max_payload = welcome->max_payload;
    memcpy(s->version, welcome->version, sizeof s->version);
    s->version[sizeof s->version - 1] = 0;
    if (carried_on) {
        s->state = NSN_READY;
        forget_batches(s, welcome->acknowledged);
        for (struct nsn_batch *batch = s->sent; batch; batch = batch->next) {
            ((struct nsn_packet *)batch->bytes)->version = s->protocol;
            nsn_control_send(s, batch->bytes, batch->length, -1);
        }
        nsn_out_resend(s);
        nsn_in_check_alive(s);
        nsn_others_renew(s, false);
        nsn_interest_flush(s);
        return;
    }
    if (s->generation)
        start_over(s);
    s->lost = !first;
    memcpy(s->directory, welcome->directory, sizeof s->directory);
    s->slot = welcome->slot;
    s->generation = welcome->generation;
    int result = enter_application(s, welcome);
    if (result < 0) {
        char words[sizeof s->error];
        memcpy(words, s->error, sizeof words);
        leave_application(s);
        s->generation = 0;
        if (!nsn_segment_gone(result)) /* otherwise the node ended just now: there will be another */
            s->state = NSN_REFUSED_STATE;
        nsn_detach(s, words);
        nsn_fail(s, result, "%s", words);
        return;
    }
    s->lost = false;
    s->state = first ? NSN_READY : NSN_LOST;
    if (first)
        nsn_interest_flush(s);
}

/* Answers a descriptor. One that did not arrive, or could not be mapped for want of something, is not answered: nsnd hands
 * it over again when this session attaches again. */
static void taken(struct nsn_session *s, int fd, int result)
{
    if (fd < 0 || result == -EMFILE || result == -ENFILE || result == -ENOMEM) {
        nsn_detach(s, fd < 0 ? "a descriptor that it sent was lost: the limit of open files is reached"
                             : "there was no memory for what it handed over");
        return;
    }
    struct nsn_packet packet = header(s, NSN_TAKEN);
    nsn_control_send(s, &packet, sizeof packet, -1);
}

static void handle(struct nsn_session *s, const uint8_t *bytes, size_t length, int fd)
{
    struct nsn_packet packet;
    if (length < sizeof packet) {
        nsn_detach(s, "a packet of it was too short");
        return;
    }
    memcpy(&packet, bytes, sizeof packet);
    if (packet.magic != NSN_PROTOCOL_MAGIC) {
        nsn_detach(s, "a packet of it was not one of this protocol");
        return;
    }
#define PACKET_IS(number, kind) (packet.type == (number) && length >= sizeof(struct kind))
    if (PACKET_IS(NSN_WELCOME, nsn_welcome)) {
        if (s->state == NSN_CONNECTING)
            welcomed(s, (const struct nsn_welcome *)bytes);
    } else if (PACKET_IS(NSN_CHALLENGE, nsn_challenge)) {
        if (s->state == NSN_CONNECTING && s->options.answers)
            challenged(s, (const struct nsn_challenge *)bytes);
    } else if (packet.type == NSN_RELAYED && fd >= 0) {
        if (s->state == NSN_CONNECTING && s->options.answers && s->relay < 0)
            s->relay = fcntl(fd, F_DUPFD_CLOEXEC, 0);
    } else if (PACKET_IS(NSN_REFUSED, nsn_refused)) {
        const struct nsn_refused *refused = (const struct nsn_refused *)bytes;
        s->state = NSN_REFUSED_STATE;
        s->refusal = -negative(refused->error);
        nsn_fail(s, negative(refused->error), "%.*s", (int)sizeof refused->text, refused->text);
    } else if (PACKET_IS(NSN_INTEREST_DONE, nsn_interest_done)) {
        const struct nsn_interest_done *done = (const struct nsn_interest_done *)bytes;
        if (done->error)
            interest_refused(s, done);
        if (done->sequence <= s->sequence)
            forget_batches(s, done->sequence);
    } else if (PACKET_IS(NSN_LINK, nsn_link_packet)) {
        const struct nsn_link_packet *link = (const struct nsn_link_packet *)bytes;
        int result = 0;
        if (s->map.slots)
            result = nsn_in_link(s, link->peer_slot, link->peer_generation, link->peer_uid, link->link_id, fd);
        taken(s, fd, result);
    } else if (PACKET_IS(NSN_SEGMENT, nsn_segment_packet)) {
        const struct nsn_segment_packet *segment = (const struct nsn_segment_packet *)bytes;
        taken(s, fd, s->map.slots ? nsn_in_segment(s, segment->peer_slot, segment->peer_generation, segment->segment,
                                                   segment->size, fd) : 0);
    } else if (PACKET_IS(NSN_PEER_GONE, nsn_peer_gone)) {
        const struct nsn_peer_gone *gone = (const struct nsn_peer_gone *)bytes;
        if (s->map.slots) {
            nsn_out_peer_gone(s, gone->peer_slot, gone->peer_generation);
            nsn_in_peer_gone(s, gone->peer_slot, gone->peer_generation);
            nsn_others_renew(s, false); /* it may have been an other: its place is let go of */
        }
    } else if (PACKET_IS(NSN_PONG, nsn_ping)) {
        const struct nsn_ping *pong = (const struct nsn_ping *)bytes;
        nsn_post_event(s, &(struct nsn_event){.kind = NSN_EVENT_PONG, .number = pong->token});
    } else if (packet.type == NSN_LAME_DUCK) {
        nsn_post_event(s, &(struct nsn_event){.kind = NSN_EVENT_LAME_DUCK});
    }
#undef PACKET_IS
}

/* Whether the next packet brings a descriptor: the kernel says that there was no room for it. A negative errno for no
 * packet. */
static int look_ahead(int control)
{
    char byte;
    struct iovec part = {&byte, 1};
    struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1};
    ssize_t length = recvmsg(control, &message, MSG_PEEK);
    return length < 0 ? -errno : (message.msg_flags & MSG_CTRUNC) != 0;
}

/* A process that is at its limit of open files has one descriptor kept for what is only mapped and closed again. Without it
 * the kernel would throw away what comes, and a whole link with it. */
static void keep_spare(struct nsn_session *s)
{
    if (s->spare < 0 && s->bell >= 0)
        s->spare = fcntl(s->bell, F_DUPFD_CLOEXEC, 0);
}

static void give_up_spare(struct nsn_session *s)
{
    if (s->spare >= 0)
        close(s->spare);
    s->spare = -1;
}

/* Reads all that has come. Returns how many packets, or a negative errno when the connection is over. */
int nsn_control_receive(struct nsn_session *s)
{
    _Alignas(8) uint8_t bytes[sizeof(struct nsn_welcome) + 512];
    int packets = 0;
    while (s->control >= 0 && packets < 1024) {
        struct iovec part = {bytes, sizeof bytes};
        union {
            char bytes[CMSG_SPACE(sizeof(int) * 4)];
            struct cmsghdr align;
        } ancillary;
        struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1, .msg_control = ancillary.bytes,
                                 .msg_controllen = sizeof ancillary.bytes};
        int brings = look_ahead(s->control);
        if (brings == -EAGAIN)
            break;
        if (brings == 1)
            give_up_spare(s);
        ssize_t length = recvmsg(s->control, &message, MSG_CMSG_CLOEXEC);
        if (length < 0 && errno == EINTR)
            continue;
        if (length < 0 && (errno == EAGAIN || errno == EWOULDBLOCK))
            break;
        if (length <= 0) {
            nsn_detach(s, length < 0 ? strerror(errno) : "it closed the connection");
            return s->state == NSN_REFUSED_STATE ? -ECONNREFUSED : -ENOTCONN;
        }
        int fds[4], count = 0;
        for (struct cmsghdr *cmsg = CMSG_FIRSTHDR(&message); cmsg; cmsg = CMSG_NXTHDR(&message, cmsg)) {
            if (cmsg->cmsg_level != SOL_SOCKET || cmsg->cmsg_type != SCM_RIGHTS)
                continue;
            count = (int)((cmsg->cmsg_len - CMSG_LEN(0)) / sizeof(int));
            memcpy(fds, CMSG_DATA(cmsg), (size_t)count * sizeof(int));
        }
        handle(s, bytes, (size_t)length, count > 0 ? fds[0] : -1);
        for (int i = 0; i < count; i++)
            close(fds[i]);
        keep_spare(s);
        packets++;
    }
    return packets;
}
