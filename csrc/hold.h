// A lock that is held for a block of Python, whatever interrupts it.
//
// An exception can come between any two lines of Python: a KeyboardInterrupt, say. So a lock that is
// taken in one line and given back in another can stay taken. Here both happen in C++, and where
// Python never gets to calling __exit__, the destructor does what it would have done.
#pragma once

#include <pybind11/pybind11.h>

#include <exception>
#include <utility>

namespace w2s {

// Used as `with Hold(lock): ...`, and not kept in a variable: it is then gone when the block is.
class Hold {
public:
    // All but `wait` are Python objects; the lock and the queue are threading.Lock, the others are
    // called, or None.
    //   queue   held while the lock is waited for: who has it is the next one to get the lock
    //   wait    if false, the lock is only taken if nobody has it, and without a queue
    //   begin   called with the lock held, before the block; what it raises ends the hold
    //   end     called with the exception that ended the block, or None; the lock is still held
    //   after   called when the lock has been given back, unless `end` raised
    Hold(pybind11::object lock, pybind11::object queue, bool wait, pybind11::object begin,
         pybind11::object end, pybind11::object after)
        : lock_(std::move(lock)), queue_(std::move(queue)), wait_(wait), begin_(std::move(begin)),
          end_(std::move(end)), after_(std::move(after)) {}
    Hold(const Hold&) = delete;
    Hold& operator=(const Hold&) = delete;

    ~Hold() {
        try {
            exit(pybind11::none());
        } catch (pybind11::error_already_set& error) {
            error.discard_as_unraisable("the end of a hold");
        } catch (const std::exception&) {
        }
    }

    // Whether the lock is held: always, if it was to be waited for.
    bool enter() {
        if (wait_ && !queue_.is_none()) {
            queue_.attr("acquire")();
            const Release queue{queue_};
            lock_.attr("acquire")();
            held_ = true;
        } else {
            held_ = lock_.attr("acquire")(wait_).cast<bool>();
        }
        if (held_ && !begin_.is_none()) {
            try {
                begin_();
            } catch (const pybind11::error_already_set& error) {
                exit(error.value());
                throw;
            }
        }
        return held_;
    }

    void exit(const pybind11::object& error) {
        if (!held_) {
            return;
        }
        held_ = false;
        {
            const Release lock{lock_};
            if (!end_.is_none()) {
                end_(error);
            }
        }
        if (!after_.is_none()) {
            after_();
        }
    }

private:
    struct Release {
        const pybind11::object& lock;
        ~Release() {
            try {
                lock.attr("release")();
            } catch (pybind11::error_already_set& error) {
                error.discard_as_unraisable("the end of a hold");
            }
        }
    };

    pybind11::object lock_, queue_;
    bool wait_;
    pybind11::object begin_, end_, after_;
    bool held_ = false;
};

}  // namespace w2s
