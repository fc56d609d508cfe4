/* Doorbells and the number under which a session sleeps. */
#include "nsn_wake.h"

#include <errno.h>
#include <fcntl.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include "nsn_shared.h"

#ifndef SO_PASSRIGHTS
#define SO_PASSRIGHTS 83
#endif

struct address {
    struct sockaddr_un at;
    socklen_t length;
};

static int bell_address(struct address *address, const char *directory, uint32_t slot)
{
    *address = (struct address){.at = {.sun_family = AF_UNIX}, .length = sizeof address->at};
    int length = snprintf(address->at.sun_path, sizeof address->at.sun_path, "%s/bell.%u", directory, slot);
    return length < 0 || (size_t)length >= sizeof address->at.sun_path ? -ENAMETOOLONG : 0;
}

/* An abstract name begins with NUL and ends where the address does. */
static void bell_name(struct address *address, const uint64_t identity[2])
{
    *address = (struct address){.at = {.sun_family = AF_UNIX}};
    int length = snprintf(address->at.sun_path + 1, sizeof address->at.sun_path - 1, "insane_nats/%016llx%016llx",
                          (unsigned long long)identity[0], (unsigned long long)identity[1]);
    address->length = (socklen_t)(offsetof(struct sockaddr_un, sun_path) + 1 + (size_t)length);
}

static int bind_bell(const struct address *address, char *error, size_t error_size)
{
    const char *path = address->at.sun_path;
    int bell = socket(AF_UNIX, SOCK_DGRAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (bell < 0) {
        snprintf(error, error_size, "no socket for the doorbell: %s", strerror(errno));
        return -errno;
    }
    /* Descriptors sent along with a ring would be closed by the one who is rung, and to close one can take for ever. Kernels
     * before 6.16 do not know how to forbid it. */
    setsockopt(bell, SOL_SOCKET, SO_PASSRIGHTS, &(int){0}, sizeof(int));
    if (*path)
        unlink(path);
    if (bind(bell, (const struct sockaddr *)&address->at, address->length) < 0) {
        int result = -errno;
        snprintf(error, error_size, "cannot bind the doorbell %s: %s", *path ? path : path + 1, strerror(-result));
        close(bell);
        return result;
    }
    return bell;
}

int nsn_bell_bind(const char *directory, uint32_t slot, char *error, size_t error_size)
{
    struct address address;
    int result = bell_address(&address, directory, slot);
    if (result < 0) {
        snprintf(error, error_size, "the runtime directory %s is too long for a socket's name: choose a shorter one "
                 "(INSANE_NATS_RUNTIME_DIR)", directory);
        return result;
    }
    int bell = bind_bell(&address, error, error_size);
    if (bell >= 0)
        chmod(address.at.sun_path, 0666); /* whom the directory lets in may ring */
    return bell;
}

int nsn_bell_bind_named(const uint64_t identity[2], char *error, size_t error_size)
{
    struct address address;
    bell_name(&address, identity);
    return bind_bell(&address, error, error_size);
}

void nsn_ringer_init(struct nsn_ringer *ringer)
{
    for (uint32_t i = 0; i < NSN_RINGER_SOCKETS; i++)
        ringer->sockets[i] = -1;
}

void nsn_ringer_close(struct nsn_ringer *ringer)
{
    for (uint32_t i = 0; i < NSN_RINGER_SOCKETS; i++)
        if (ringer->sockets[i] >= 0)
            close(ringer->sockets[i]);
    nsn_ringer_init(ringer);
}

/* The kernel says EAGAIN both when the bell's queue is full (it has been rung) and when this sender's buffer is (it has
 * not). A queue holds few rings, so the sender's buffer can only be full when very many bells have gone unanswered. */
static bool sender_is_full(int ringer)
{
    int size = 0, queued = 0;
    socklen_t length = sizeof size;
    if (getsockopt(ringer, SOL_SOCKET, SO_SNDBUF, &size, &length) < 0)
        return false;
    length = 9 * sizeof(uint32_t);
    uint32_t memory[9] = {0}; /* SO_MEMINFO; [2] is what lies unread at receivers */
    if (getsockopt(ringer, SOL_SOCKET, 55, memory, &length) == 0)
        queued = (int)memory[2];
    return queued + 2048 > size;
}

static int ring_by(int ringer, const struct address *address)
{
    ssize_t sent;
    do
        sent = sendto(ringer, "", 1, MSG_NOSIGNAL, (const struct sockaddr *)&address->at, address->length);
    while (sent < 0 && errno == EINTR);
    if (sent >= 0)
        return 0;
    return errno == EAGAIN && !sender_is_full(ringer) ? 0 : -errno;
}

static int ring_at(struct nsn_ringer *ringer, const struct address *address)
{
    for (uint32_t i = 0; i < NSN_RINGER_SOCKETS; i++) {
        int *socket_at = &ringer->sockets[i];
        if (*socket_at < 0)
            *socket_at = socket(AF_UNIX, SOCK_DGRAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
        if (*socket_at < 0)
            return -EAGAIN;
        int result = ring_by(*socket_at, address);
        if (result != -EAGAIN) /* else it is full: the next one */
            return result;
    }
    return -EAGAIN;
}

int nsn_bell_ring(struct nsn_ringer *ringer, const char *directory, uint32_t slot)
{
    struct address address;
    int result = bell_address(&address, directory, slot);
    return result < 0 ? result : ring_at(ringer, &address);
}

int nsn_bell_ring_named(struct nsn_ringer *ringer, const uint64_t identity[2])
{
    struct address address;
    bell_name(&address, identity);
    return ring_at(ringer, &address);
}

/* One system call: a bell's queue holds few rings. What is left beyond makes the descriptor readable again. */
size_t nsn_bell_answer(int bell)
{
    char ring[8];
    struct iovec part = {ring, sizeof ring};
    struct mmsghdr rings[16];
    for (size_t i = 0; i < 16; i++)
        rings[i] = (struct mmsghdr){.msg_hdr = {.msg_iov = &part, .msg_iovlen = 1}};
    int answered = recvmmsg(bell, rings, 16, MSG_DONTWAIT, NULL);
    return answered > 0 ? (size_t)answered : 0;
}

void nsn_sleep_begin(struct nsn_page *page, uint64_t *number)
{
    if (!nsn_sleeping(*number))
        nsn_store_relaxed(&page->asleep, ++*number);
    nsn_fence(); /* pairs with the fence a writer makes before nsn_wake_due: one of the two sees the other */
}

void nsn_sleep_end(struct nsn_page *page, uint64_t *number)
{
    if (nsn_sleeping(*number))
        nsn_store_relaxed(&page->asleep, ++*number);
}

bool nsn_wake_due(const struct nsn_page *page, uint64_t *rung)
{
    uint64_t number = nsn_load_relaxed(&page->asleep); /* the caller's fence pairs with nsn_sleep_begin's */
    if (!nsn_sleeping(number) || number == *rung)
        return false;
    *rung = number;
    return true;
}
