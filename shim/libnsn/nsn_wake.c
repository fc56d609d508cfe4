/* Doorbells and the number under which a session sleeps. */
#include "nsn_wake.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include "nsn_shared.h"

static int bell_address(struct sockaddr_un *address, const char *directory, uint32_t slot)
{
    memset(address, 0, sizeof *address);
    address->sun_family = AF_UNIX;
    int length = snprintf(address->sun_path, sizeof address->sun_path, "%s/bell.%u", directory, slot);
    return length < 0 || (size_t)length >= sizeof address->sun_path ? -ENAMETOOLONG : 0;
}

int nsn_bell_bind(const char *directory, uint32_t slot, char *error, size_t error_size)
{
    struct sockaddr_un address;
    int result = bell_address(&address, directory, slot);
    if (result < 0) {
        snprintf(error, error_size, "the runtime directory %s is too long for a socket's name: choose a shorter one "
                 "(INSANE_NATS_RUNTIME_DIR)", directory);
        return result;
    }
    int bell = socket(AF_UNIX, SOCK_DGRAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (bell < 0) {
        snprintf(error, error_size, "no socket for the doorbell: %s", strerror(errno));
        return -errno;
    }
    unlink(address.sun_path);
    if (bind(bell, (struct sockaddr *)&address, sizeof address) < 0) {
        result = -errno;
        snprintf(error, error_size, "cannot bind the doorbell %s: %s", address.sun_path, strerror(-result));
        close(bell);
        return result;
    }
    chmod(address.sun_path, 0600);
    return bell;
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

static int ring_by(int ringer, const struct sockaddr_un *address)
{
    ssize_t sent;
    do
        sent = sendto(ringer, "", 1, MSG_NOSIGNAL, (const struct sockaddr *)address, sizeof *address);
    while (sent < 0 && errno == EINTR);
    if (sent >= 0)
        return 0;
    return errno == EAGAIN && !sender_is_full(ringer) ? 0 : -errno;
}

int nsn_bell_ring(struct nsn_ringer *ringer, const char *directory, uint32_t slot)
{
    struct sockaddr_un address;
    int result = bell_address(&address, directory, slot);
    for (uint32_t i = 0; i < NSN_RINGER_SOCKETS && result == 0; i++) {
        int *socket_at = &ringer->sockets[i];
        if (*socket_at < 0)
            *socket_at = socket(AF_UNIX, SOCK_DGRAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
        if (*socket_at < 0)
            return -EAGAIN;
        result = ring_by(*socket_at, &address);
        if (result != -EAGAIN)
            return result;
        result = 0; /* full: the next one */
    }
    return result < 0 ? result : -EAGAIN;
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
