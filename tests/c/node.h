/* A node in a thread, for unit tests of sessions in C under sanitizers: what nsnd does for sessions of one application,
 * on the same slots and log. (nsnd itself is tested from Python.) */
#ifndef NODE_H
#define NODE_H

#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include "check.h"
#include "nsn_log.h"
#include "nsn_protocol.h"
#include "nsn_session.h"
#include "nsn_shared.h"
#include "nsn_slots.h"

#define NODE_SESSIONS 64

struct node_session {
    int fd;
    bool hello;
    uint32_t slot, generation, uid;
};

struct node {
    char directory[64], socket_path[96];
    int listener, wake[2];
    pthread_t thread;
    struct nsn_slots *slots;
    struct nsn_log_writer *log;
    struct node_session sessions[NODE_SESSIONS];
    bool linked[NODE_SESSIONS][NODE_SESSIONS]; /* by slot */
    uint64_t client_ids;
};

static struct node_session *node_by_slot(struct node *node, uint32_t slot, uint32_t generation)
{
    for (int i = 0; i < NODE_SESSIONS; i++)
        if (node->sessions[i].fd >= 0 && node->sessions[i].hello && node->sessions[i].slot == slot &&
            node->sessions[i].generation == generation)
            return &node->sessions[i];
    return NULL;
}

static void node_send(int to, const void *bytes, size_t length, int fd)
{
    struct iovec part = {(void *)bytes, length};
    struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1};
    union {
        char bytes[CMSG_SPACE(sizeof(int))];
        struct cmsghdr align;
    } ancillary = {0};
    if (fd >= 0) {
        message.msg_control = ancillary.bytes;
        message.msg_controllen = sizeof ancillary.bytes;
        struct cmsghdr *header = CMSG_FIRSTHDR(&message);
        header->cmsg_level = SOL_SOCKET;
        header->cmsg_type = SCM_RIGHTS;
        header->cmsg_len = CMSG_LEN(sizeof(int));
        memcpy(CMSG_DATA(header), &fd, sizeof fd);
    }
    sendmsg(to, &message, MSG_NOSIGNAL);
}

static void node_forget(struct node *node, struct node_session *session)
{
    close(session->fd);
    session->fd = -1;
    if (!session->hello)
        return;
    nsn_log_writer_session_gone(node->log, session->slot, session->generation);
    nsn_slots_free_slot(node->slots, session->slot);
    struct nsn_peer_gone gone = {{NSN_PROTOCOL_MAGIC, NSN_PEER_GONE, NSN_PROTOCOL_VERSION}, session->slot, session->generation};
    for (int i = 0; i < NODE_SESSIONS; i++) {
        struct node_session *other = &node->sessions[i];
        if (other->fd >= 0 && other->hello &&
            (session->uid != geteuid() || node->linked[other->slot][session->slot] || node->linked[session->slot][other->slot]))
            node_send(other->fd, &gone, sizeof gone, -1);
    }
    for (int i = 0; i < NODE_SESSIONS; i++)
        node->linked[i][session->slot] = node->linked[session->slot][i] = false;
}

static void node_packet(struct node *node, struct node_session *session, uint8_t *bytes, int fd)
{
    struct nsn_packet *packet = (struct nsn_packet *)bytes;
    if (packet->type == NSN_HELLO) {
        struct nsn_hello *hello = (struct nsn_hello *)bytes;
        struct nsn_welcome welcome = {{NSN_PROTOCOL_MAGIC, NSN_WELCOME, NSN_PROTOCOL_VERSION}, .client_id = ++node->client_ids,
                                      .max_payload = 1 << 20, .version = "0.1.0"};
        char error[256] = "";
        int slot = session->uid == geteuid()
                       ? nsn_slots_claim(node->slots, hello->identity, (uint32_t)getpid(), 1, session->uid,
                                         &session->generation)
                       : nsn_slots_claim_other(node->slots, hello->identity, (uint32_t)getpid(), 1, session->uid,
                                               hello->segment, &session->generation, error, sizeof error);
        if (slot < 0) {
            struct nsn_refused refused = {{NSN_PROTOCOL_MAGIC, NSN_REFUSED, NSN_PROTOCOL_VERSION}, .error = -slot};
            strcpy(refused.text, error);
            node_send(session->fd, &refused, sizeof refused, -1);
            node_forget(node, session);
            return;
        }
        CHECK(slot >= 0 && slot < NODE_SESSIONS);
        session->slot = welcome.slot = (uint32_t)slot;
        welcome.generation = session->generation;
        session->hello = true;
        strcpy(welcome.directory, node->directory);
        node_send(session->fd, &welcome, sizeof welcome, -1);
    } else if (packet->type == NSN_INTEREST) {
        struct nsn_interest *interest = (struct nsn_interest *)bytes;
        struct nsn_interest_done done = {{NSN_PROTOCOL_MAGIC, NSN_INTEREST_DONE, NSN_PROTOCOL_VERSION},
                                         .sequence = interest->sequence};
        done.error = nsn_log_writer_apply(node->log, session->slot, session->generation, bytes + sizeof *interest,
                                          interest->length, interest->count, &done.failed);
        nsn_slots_acknowledge(node->slots, session->slot, interest->sequence);
        node_send(session->fd, &done, sizeof done, -1);
    } else if (packet->type == NSN_LINK || packet->type == NSN_SEGMENT) {
        /* both packets begin alike */
        struct nsn_link_packet *link = (struct nsn_link_packet *)bytes;
        struct node_session *peer = node_by_slot(node, link->peer_slot, link->peer_generation);
        if (peer) {
            node->linked[session->slot][peer->slot] = true;
            link->peer_slot = session->slot;
            link->peer_generation = session->generation;
            if (packet->type == NSN_LINK)
                link->peer_uid = session->uid;
            node_send(peer->fd, bytes, packet->type == NSN_LINK ? sizeof *link : sizeof(struct nsn_segment_packet), fd);
        } else {
            struct nsn_peer_gone gone = {{NSN_PROTOCOL_MAGIC, NSN_PEER_GONE, NSN_PROTOCOL_VERSION}, link->peer_slot,
                                         link->peer_generation};
            node_send(session->fd, &gone, sizeof gone, -1);
        }
    } else if (packet->type == NSN_PING) {
        packet->type = NSN_PONG;
        node_send(session->fd, bytes, sizeof(struct nsn_ping), -1);
    } else if (packet->type == NSN_GOODBYE) {
        node_forget(node, session);
    }
}

static void node_read(struct node *node, struct node_session *session)
{
    static _Alignas(8) uint8_t bytes[NSN_PACKET_MAX];
    struct iovec part = {bytes, sizeof bytes};
    union {
        char bytes[CMSG_SPACE(sizeof(int))];
        struct cmsghdr align;
    } ancillary;
    struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1, .msg_control = ancillary.bytes,
                             .msg_controllen = sizeof ancillary.bytes};
    ssize_t length = recvmsg(session->fd, &message, MSG_DONTWAIT);
    if (length < 0 && (errno == EAGAIN || errno == ECONNRESET)) /* reset: it died with unread packets; what it sent is there */
        return;
    if (length <= 0) {
        node_forget(node, session);
        return;
    }
    int fd = -1;
    struct cmsghdr *header = CMSG_FIRSTHDR(&message);
    if (header)
        memcpy(&fd, CMSG_DATA(header), sizeof fd);
    node_packet(node, session, bytes, fd);
    if (fd >= 0)
        close(fd);
}

/* Waits for at most timeout_ms (-1: for ever) and serves what has come. False when the node is to stop. */
static bool node_step(struct node *node, int timeout_ms)
{
    struct pollfd fds[NODE_SESSIONS + 2] = {{node->wake[0], POLLIN, 0}, {node->listener, POLLIN, 0}};
    for (int i = 0; i < NODE_SESSIONS; i++)
        fds[i + 2] = (struct pollfd){node->sessions[i].fd, POLLIN, 0};
    poll(fds, NODE_SESSIONS + 2, timeout_ms);
    if (fds[0].revents)
        return false;
    for (int i = 0; i < NODE_SESSIONS; i++)
        if (fds[i + 2].revents && node->sessions[i].fd >= 0)
            node_read(node, &node->sessions[i]);
    if (!fds[1].revents)
        return true;
    int fd = accept(node->listener, NULL, NULL), place = 0;
    while (place < NODE_SESSIONS && node->sessions[place].fd >= 0)
        place++;
    CHECK(fd >= 0 && place < NODE_SESSIONS);
    struct ucred peer;
    socklen_t size = sizeof peer;
    CHECK_EQUAL(getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &peer, &size), 0);
    node->sessions[place] = (struct node_session){.fd = fd, .uid = peer.uid};
    return true;
}

static inline void *node_run(void *context)
{
    while (node_step(context, -1))
        ;
    return NULL;
}

/* A node that serves when node_step is called. */
static struct node *node_open(void)
{
    struct node *node = calloc(1, sizeof *node);
    char error[256] = "";
    strcpy(node->directory, "/dev/shm/nsn-node-XXXXXX");
    CHECK(mkdtemp(node->directory));
    CHECK_EQUAL(chmod(node->directory, 0711), 0);
    CHECK_EQUAL(nsn_slots_open(&node->slots, node->directory, error, sizeof error), 0);
    CHECK_EQUAL(nsn_slots_share(node->slots, true), 0);
    CHECK_EQUAL(nsn_log_writer_open(&node->log, node->directory, nsn_slots_log(node->slots), 0, error, sizeof error), 0);
    for (int i = 0; i < NODE_SESSIONS; i++)
        node->sessions[i].fd = -1;
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    snprintf(node->socket_path, sizeof node->socket_path, "%s/sock", node->directory);
    strcpy(address.sun_path, node->socket_path);
    node->listener = socket(AF_UNIX, SOCK_SEQPACKET, 0);
    CHECK_EQUAL(bind(node->listener, (struct sockaddr *)&address, sizeof address), 0);
    CHECK_EQUAL(chmod(node->socket_path, 0666), 0);
    CHECK_EQUAL(listen(node->listener, 64), 0);
    CHECK_EQUAL(pipe(node->wake), 0);
    return node;
}

static inline struct node *node_start(void)
{
    struct node *node = node_open();
    CHECK_EQUAL(pthread_create(&node->thread, NULL, node_run, node), 0);
    return node;
}

static void node_close(struct node *node)
{
    for (int i = 0; i < NODE_SESSIONS; i++)
        if (node->sessions[i].fd >= 0)
            close(node->sessions[i].fd);
    close(node->listener);
    close(node->wake[0]);
    close(node->wake[1]);
    nsn_log_writer_close(node->log);
    nsn_slots_close(node->slots);
    char command[128];
    snprintf(command, sizeof command, "rm -rf '%s'", node->directory);
    CHECK_EQUAL(system(command), 0);
    free(node);
}

static inline void node_stop(struct node *node)
{
    CHECK_EQUAL(write(node->wake[1], "x", 1), 1);
    pthread_join(node->thread, NULL);
    node_close(node);
}

static inline struct nsn_session *node_session_with(struct node *node, struct nsn_session_options options)
{
    char error[256] = "";
    options.socket_path = node->socket_path;
    options.application_id = 4222;
    struct nsn_session *session = nsn_session_open(&options, error, sizeof error);
    if (!session)
        fprintf(stderr, "%s\n", error);
    CHECK(session);
    for (int i = 0; i < 5000 && nsn_session_state(session) == NSN_CONNECTING; i++)
        nsn_session_process(session, 1000000);
    if (nsn_session_state(session) != NSN_READY)
        fprintf(stderr, "%s\n", nsn_session_error(session));
    CHECK_EQUAL(nsn_session_state(session), NSN_READY);
    return session;
}

static inline struct nsn_session *node_session(struct node *node)
{
    return node_session_with(node, (struct nsn_session_options){.name = "test"});
}

/* Waits at most ten seconds for a condition, processing a session meanwhile. */
#define WAIT_FOR(session, condition)                                                                                        \
    do {                                                                                                                    \
        uint64_t wait_until = nsn_now_ns() + 10000000000ull;                                                                \
        while (!(condition)) {                                                                                              \
            CHECK(nsn_now_ns() < wait_until && #condition);                                                                 \
            nsn_session_process(session, 0);                                                                                \
        }                                                                                                                   \
    } while (0)

static inline void node_subscribe(struct nsn_session *session, uint32_t sid, const char *subject, const char *queue)
{
    CHECK_EQUAL(nsn_subscribe(session, sid, subject, strlen(subject), queue, strlen(queue)), 0);
    WAIT_FOR(session, nsn_interest_settled(session, 100000));
}

static inline int node_publish(struct nsn_session *session, const char *subject, const void *payload, size_t length)
{
    return nsn_publish(session, subject, strlen(subject), "", 0, NULL, 0, payload, length);
}

#endif
