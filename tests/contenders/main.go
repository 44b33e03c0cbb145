// A contender by Go's own concurrency package: commands on stdin, events on stdout as JSON lines, one session.
//
//	lock NAME          held {key, token}      concurrency.Mutex
//	read NAME          held                   the RWMutex of etcd's recipes, which has no token
//	write NAME         held
//	unlock             released {until}       whatever of these is held; until: before the request was sent
//	campaign NAME VAL  elected {key, created} concurrency.Election
//	proclaim VAL       proclaimed
//	resign             resigned {until}
//	observe NAME       leader {key, value}    again and again, beside other commands
//	count NAME KEY N   counted                N times adds one to the number in KEY under the lock NAME; "-": unlocked
//	bench NAME N       benched {seconds}      N times lock and unlock; seconds: of each
//	crowd NAME S N     counted {count}        for S seconds N goroutines, with a lock each: how often they had theirs
//
// main.py is the same by celery_etcd_lock, as far as tests need it; driver.py starts either.
//
// One command at a time: what waits keeps those after it waiting. Each event says in "at" at which second of
// CLOCK_MONOTONIC it was made, which all processes of a host share. Errors are events too. The end of stdin ends the
// session; when its lease ends before, it says "lost" and the process ends.
package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"log"
	"os"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"

	"go.etcd.io/etcd/clientv3"
	"go.etcd.io/etcd/clientv3/concurrency"
	recipe "go.etcd.io/etcd/contrib/recipes"
	"golang.org/x/sys/unix"
)

type fields map[string]any

type contender struct {
	client   *clientv3.Client
	session  *concurrency.Session
	election *concurrency.Election
	unlock   func() error
}

var (
	ctx    = context.Background()
	output sync.Mutex
)

func now() float64 {
	var at unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &at); err != nil {
		log.Fatal(err)
	}
	return float64(at.Sec) + float64(at.Nsec)/1e9
}

func say(event string, more fields) {
	line := fields{"event": event, "at": now()}
	for name, value := range more {
		line[name] = value
	}
	output.Lock()
	defer output.Unlock()
	if err := json.NewEncoder(os.Stdout).Encode(line); err != nil {
		os.Exit(1) // nobody listens any more
	}
}

func main() {
	endpoints := flag.String("endpoints", "http://127.0.0.1:2379", "URLs, separated by commas")
	ttl := flag.Int("ttl", 60, "of the session, in seconds")
	flag.Parse()

	client, err := clientv3.New(clientv3.Config{Endpoints: strings.Split(*endpoints, ",")})
	if err != nil {
		log.Fatal(err)
	}
	session, err := concurrency.NewSession(client, concurrency.WithTTL(*ttl))
	if err != nil {
		log.Fatal(err)
	}
	c := &contender{client: client, session: session}
	var closing atomic.Bool
	go func() {
		<-session.Done()
		if !closing.Load() {
			say("lost", nil)
			os.Exit(1)
		}
	}()
	say("ready", fields{"lease": fmt.Sprintf("%x", session.Lease())})

	for lines := bufio.NewScanner(os.Stdin); lines.Scan(); {
		words := strings.Fields(lines.Text())
		if err := c.do(words); err != nil {
			say("error", fields{"command": lines.Text(), "error": err.Error()})
		}
	}
	closing.Store(true)
	session.Close()
}

func (c *contender) do(words []string) error {
	usage := map[string]int{"lock": 2, "read": 2, "write": 2, "unlock": 1, "campaign": 3, "proclaim": 2,
		"resign": 1, "observe": 2, "count": 4, "bench": 3, "crowd": 4}
	if len(words) == 0 || usage[words[0]] != len(words) {
		return errors.New("no such command, or not its arguments")
	}
	switch command, arguments := words[0], words[1:]; command {
	case "lock":
		return c.lock(arguments[0])
	case "read", "write":
		return c.readOrWrite(arguments[0], command == "read")
	case "unlock":
		return c.release()
	case "campaign":
		return c.campaign(arguments[0], arguments[1])
	case "proclaim", "resign":
		if c.election == nil {
			return errors.New("not elected")
		}
		if command == "proclaim" {
			return c.proclaim(arguments[0])
		}
		return c.resign()
	case "observe":
		go c.observe(arguments[0])
		return nil
	default: // count NAME KEY N, bench NAME N, crowd NAME S N
		times, err := strconv.Atoi(arguments[len(arguments)-1])
		if err != nil {
			return err
		}
		if command == "count" {
			return c.count(arguments[0], arguments[1], times)
		}
		if command == "crowd" {
			return c.crowd(arguments[0], arguments[1], times)
		}
		return c.bench(arguments[0], times)
	}
}

func (c *contender) lock(name string) error {
	mutex := concurrency.NewMutex(c.session, name)
	if err := mutex.Lock(ctx); err != nil {
		return err
	}
	c.unlock = func() error { return mutex.Unlock(ctx) }
	say("held", fields{"key": mutex.Key(), "token": mutex.Header().Revision})
	return nil
}

func (c *contender) readOrWrite(name string, read bool) error {
	mutex := recipe.NewRWMutex(c.session, name)
	take, unlock := mutex.Lock, mutex.Unlock
	if read {
		take, unlock = mutex.RLock, mutex.RUnlock
	}
	if err := take(); err != nil {
		return err
	}
	c.unlock = unlock
	say("held", nil)
	return nil
}

func (c *contender) release() error {
	if c.unlock == nil {
		return errors.New("not held")
	}
	until := now()
	if err := c.unlock(); err != nil {
		return err
	}
	c.unlock = nil
	say("released", fields{"until": until})
	return nil
}

func (c *contender) campaign(name, value string) error {
	election := concurrency.NewElection(c.session, name)
	if err := election.Campaign(ctx, value); err != nil {
		return err
	}
	c.election = election
	say("elected", fields{"key": election.Key(), "created": election.Rev()})
	return nil
}

func (c *contender) proclaim(value string) error {
	if err := c.election.Proclaim(ctx, value); err != nil {
		return err
	}
	say("proclaimed", nil)
	return nil
}

func (c *contender) resign() error {
	until := now()
	if err := c.election.Resign(ctx); err != nil {
		return err
	}
	c.election = nil
	say("resigned", fields{"until": until})
	return nil
}

func (c *contender) observe(name string) {
	for seen := range concurrency.NewElection(c.session, name).Observe(ctx) {
		kv := seen.Kvs[0]
		say("leader", fields{"key": string(kv.Key), "value": string(kv.Value)})
	}
	say("error", fields{"command": "observe " + name, "error": "no more is observed"})
}

// The number is read and put in two requests, so that two who are in at once lose some of what they add.
func (c *contender) count(name, key string, times int) error {
	mutex := concurrency.NewMutex(c.session, name)
	for i := 0; i < times; i++ {
		if name != "-" {
			if err := mutex.Lock(ctx); err != nil {
				return err
			}
		}
		found, err := c.client.Get(ctx, key)
		if err != nil {
			return err
		}
		number, err := strconv.Atoi(string(found.Kvs[0].Value))
		if err != nil {
			return err
		}
		if _, err := c.client.Put(ctx, key, strconv.Itoa(number+1)); err != nil {
			return err
		}
		if name != "-" {
			if err := mutex.Unlock(ctx); err != nil {
				return err
			}
		}
	}
	say("counted", nil)
	return nil
}

func (c *contender) bench(name string, times int) error {
	mutex := concurrency.NewMutex(c.session, name)
	seconds := make([]float64, times)
	for i := range seconds {
		began := now()
		if err := mutex.Lock(ctx); err != nil {
			return err
		}
		if err := mutex.Unlock(ctx); err != nil {
			return err
		}
		seconds[i] = now() - began
	}
	say("benched", fields{"seconds": seconds})
	return nil
}

func (c *contender) crowd(name, duration string, size int) error {
	seconds, err := strconv.ParseFloat(duration, 64)
	if err != nil {
		return err
	}
	var count atomic.Int64
	var there, done sync.WaitGroup
	there.Add(size)
	done.Add(size)
	for i := 0; i < size; i++ {
		go func(mutex *concurrency.Mutex) {
			defer done.Done()
			there.Done()
			there.Wait()
			for until := now() + seconds; now() < until; count.Add(1) {
				if mutex.Lock(ctx) != nil || mutex.Unlock(ctx) != nil {
					return
				}
			}
		}(concurrency.NewMutex(c.session, fmt.Sprintf("%s/%d", name, i)))
	}
	done.Wait()
	say("counted", fields{"count": count.Load()})
	return nil
}
